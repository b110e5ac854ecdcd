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

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor


class TreeSum:
    """Terms of several things, by number, added up as they come. It holds one sum of each thing for every 1 among the binary digits of
    how many have come."""

    def __init__(self) -> None:
        self._count = 0  # of terms
        self._levels: list[dict[int, Tensor]] = []  # sums of 2^level terms, where that digit of the count is 1

    def add(self, terms: Mapping[int, Tensor]) -> None:
        """Add a term of each thing. What has none has zero.

        Args:
            terms: by number, float32 or float64. They are kept, and changed.
        """
        carried, level = dict(terms), 0
        while self._count >> level & 1:
            carried, self._levels[level] = _added(self._levels[level], carried), {}
            level += 1
        if level == len(self._levels):
            self._levels.append({})
        self._levels[level] = carried
        self._count += 1

    def sums(self) -> Iterator[Mapping[int, Tensor]]:
        """Those of the last terms first, in the order in which they are to be added to those that come next."""
        return (held for level, held in enumerate(self._levels) if self._count >> level & 1)

    def numbers(self) -> set[int]:
        """Of things that have had a term."""
        return {number for held in self._levels for number in held}

    def drop(self, numbers: Iterable[int]) -> None:
        """These things have had no terms; the others have had as many."""
        for held in self._levels:
            for number in numbers:
                held.pop(number, None)

    def clear(self) -> None:
        """There have been no terms."""
        self._count = 0
        self._levels.clear()


@torch.no_grad()
def _added(left: dict[int, Tensor], right: dict[int, Tensor]) -> dict[int, Tensor]:
    """Their sums, in the memory of the first that there is. Floating-point addition is commutative: only who is added to whom counts."""
    both = [number for number in left if number in right]
    if both:
        torch._foreach_add_([left[number] for number in both], [right[number] for number in both])
    for number in left.keys() ^ right.keys():
        (left if number in left else right)[number].add_(0.0)  # -0 becomes 0
    return {**right, **left}
