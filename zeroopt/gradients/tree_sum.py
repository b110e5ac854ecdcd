"""Sums of gradients of one rank's micro-batches, in the binary tree in which ranks sum theirs.

`ops.reduce` adds what ranks have in a tree of which each left branch is full. M micro-batches of a rank, M a power of two, are a branch
of the tree over all N x M of them, when the rank adds them in a tree, too. So the sum is the same, however many ranks share them:

    micro-batch     0   1   2   3   4   5   6   7
                    └─┬─┘   └─┬─┘   └─┬─┘   └─┬─┘
                      └───┬───┘       └───┬───┘
    one of 2 ranks        0               1           4 micro-batches each
                          └───────┬───────┘           `ops.reduce`

It is a binary counter: a term that comes is carried past all levels that hold a sum of as many terms as it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class TreeSum:
    """Terms of several things, by number, added up as they come. It holds one sum of each thing for every 1 among the binary digits of
    how many have come."""

    def __init__(self) -> None:
        self._levels: list[dict[int, Tensor]] = []  # of 2^level terms; empty where there is none

    def add(self, terms: Mapping[int, Tensor]) -> None:
        """Add a term of each thing. What has none has zero.

        Args:
            terms: by number, float32 or float64. They are kept, and changed.
        """
        carried = dict(terms)
        for level, held in enumerate(self._levels):
            if not held:
                self._levels[level] = carried
                return
            self._levels[level] = {}
            carried = _added(held, carried)
        self._levels.append(carried)

    def sums(self) -> Iterator[Mapping[int, Tensor]]:
        """Those of the last terms first, in the order in which they are to be added to those that come next."""
        return (held for held in self._levels if held)

    def numbers(self) -> set[int]:
        """Of things that have had a term."""
        return {number for held in self._levels for number in held}

    def forget(self, numbers: set[int] | None = None) -> None:
        """These things have had none, or none of all has."""
        if numbers is None:
            self._levels.clear()
        for held in self._levels:
            for number in held.keys() & (numbers or set()):
                del held[number]


@torch.no_grad()
def _added(left: dict[int, Tensor], right: dict[int, Tensor]) -> dict[int, Tensor]:
    """Their sums, in the memory of the first that there is. Floating-point addition is commutative: only who is added to whom counts."""
    both = [number for number in left if number in right]
    if both:
        torch._foreach_add_([left[number] for number in both], [right[number] for number in both])
    for number in left.keys() ^ right.keys():
        (left if number in left else right)[number].add_(0.0)  # -0 becomes 0
    return {**right, **left}
