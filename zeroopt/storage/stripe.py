"""A part of a bucket that travels by itself, where all of the bucket at once would need too large a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..plan.params import ManagedParam


class Piece(NamedTuple):
    """Elements of a parameter in a buffer.

    Attributes:
        start: the first of the parameter's elements.
        offset: where in the buffer it lies.
        numel: how many lie there side by side.
    """

    owner: ManagedParam
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Stripe:
    """The same part of every slice of a bucket, side by side in a buffer of as many slices.

        bucket    │ ▒▒ ██ ░░        │ ▒▒ ██ ░░        │      2 slices, 3 stripes
        buffer    │ ██ │ ██ │                                the second of them

    The sum of its own slice is that part of the sum of the bucket's: which rank owns what does not depend on stripes.

    Attributes:
        begin, end: of each slice, its elements in the stripe.
        slice_numel, num_slices: of the bucket.
    """

    begin: int
    end: int
    slice_numel: int
    num_slices: int

    @cached_property
    def numel(self) -> int:
        """Of a buffer for it."""
        return self.num_slices * (self.end - self.begin)

    @cached_property
    def is_first(self) -> bool:
        """Whether it starts before the others of its bucket."""
        return self.begin == 0

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the bucket, whose elements then lie in the buffer as they do in the bucket."""
        return self.end - self.begin == self.slice_numel

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """First and last element, plus one, in the bucket, of each part of it, and where that begins in the buffer."""
        if self.is_whole:
            yield 0, self.num_slices * self.slice_numel, 0
            return
        for number in range(self.num_slices):
            first = number * self.slice_numel
            yield first + self.begin, first + self.end, number * (self.end - self.begin)

    def pieces(self, params: Sequence[ManagedParam]) -> Iterator[Piece]:
        """What of a bucket's parameters lies in the buffer, in the order in which it does.

        Args:
            params: those of the bucket, in its order.
        """
        for begin, end, offset in self.ranges():
            for managed in params:
                first, last = max(begin, managed.offset), min(end, managed.offset + managed.numel)
                if first < last:
                    yield Piece(managed, first - managed.offset, offset + first - begin, last - first)


def cut_in_stripes(padded_numel: int, num_slices: int, most_numel: int) -> list[Stripe]:
    """The stripes of a bucket, few of them, of at most `most_numel` elements each."""
    slice_numel = padded_numel // num_slices
    length = max(1, most_numel // num_slices)
    return [
        Stripe(begin, min(begin + length, slice_numel), slice_numel, num_slices)
        for begin in range(0, slice_numel, length)
    ]
