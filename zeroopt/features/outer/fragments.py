"""Fragments: sets of buckets that have their outer steps in turn, and which steps of training have to do with which of them.

`every` = 6, three fragments, a delay of 2:

    step          1   2   3   4   5   6   7   8   9  10  11  12
    fragment 0                        ●───┼───▶               ●──      ● sets out with what has been stepped so far
    fragment 1        ●───┼───▶               ●───┼───▶                ┼ its outer step is taken
    fragment 2                ●───┼───▶               ●───┼───▶        ▶ what has become of it arrives

Without a delay all three are in one step, and with one fragment these are the steps 6, 12, 18 …

Buckets are dealt out in turn, so that a fragment has layers of all depths ("strided", in Douillard et al. 2025, arXiv:2501.18512).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """The fragments with which a step has to do.

    Attributes:
        setting_out: their outer gradients begin to travel.
        stepping: sums are there; the outer optimizer steps, and what it has made begins to travel.
        arriving: it is there, and becomes the parameters.
    """

    setting_out: frozenset[int] = frozenset()
    stepping: frozenset[int] = frozenset()
    arriving: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.setting_out or self.stepping or self.arriving)

    @staticmethod
    def at_once(fragments: frozenset[int]) -> Due:
        """All three in one step."""
        return Due(fragments, fragments, fragments)


@dataclass(frozen=True)
class Schedule:
    """When fragments have their outer steps. Steps are counted from 1.

    Attributes:
        every: steps between two outer steps of a fragment.
        num_fragments: into how many the buckets are dealt out.
        delay: steps from setting out to arriving, fewer than `every`.
    """

    every: int
    num_fragments: int = 1
    delay: int = 0

    def fragment_of(self, bucket: int) -> int:
        """To which fragment a bucket belongs, by its number among those of the optimizer."""
        return bucket % self.num_fragments

    def due(self, step: int) -> Due:
        """What a step has to do."""
        return Due(
            self._set_out_at(step), self._set_out_at(step - (self.delay + 1) // 2), self._set_out_at(step - self.delay)
        )

    def on_the_way(self, step: int) -> frozenset[int]:
        """The fragments that have set out when a step is over, and not arrived."""
        return frozenset[int]().union(*(self._set_out_at(step - ago) for ago in range(self.delay)))

    def _set_out_at(self, step: int) -> frozenset[int]:
        fragments = range(self.num_fragments)
        return frozenset(
            f for f in fragments if step > 0 and (step - f * self.every // self.num_fragments) % self.every == 0
        )
