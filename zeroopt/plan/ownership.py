"""Which elements of every bucket this rank steps, and which of them it writes into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .._C import Plan, Segment
from .redistribution import Redistribution


@dataclass(frozen=True)
class Ownership:
    """Every bucket is cut into slices of one length, one a rank. Buckets of whole parameters that lie across slices have owners
    instead, each with a range of its own.

                               slice 0      slice 1      slice 2
        by slices, rank 1    │            │ steps and  │            │
                             │            │ writes     │            │
        stage 0, rank 1      │ steps      │ steps and  │ steps      │
                             │            │ writes     │            │

    Attributes:
        num_slices: the number of ranks.
        slice_index: which slice is this rank's.
        by_slices: each rank steps its own slice; otherwise all ranks step everything, and have the same state.
        replica: where several ranks own one slice, the how-manyeth of them this one is. The first one writes.
    """

    num_slices: int
    slice_index: int
    by_slices: bool
    replica: int = 0

    @property
    def has_all(self) -> bool:
        """Whether this rank steps everything."""
        return not self.by_slices or self.num_slices == 1

    def stepped(self, plan: Plan, number: int) -> tuple[int, int]:
        """First and last element, plus one, of what this rank steps of a bucket: its own range."""
        return plan.own_range(number, self.slice_index) if self.by_slices else (0, plan.buckets[number].padded_numel)

    def written(self, own_range: tuple[int, int]) -> tuple[int, int]:
        """Likewise of its own range, what this rank writes into a checkpoint: where ranks have the same, each writes a share."""
        if self.replica > 0:
            return 0, 0
        numel = own_range[1] - own_range[0]
        if self.by_slices:
            return 0, numel
        share = numel // self.num_slices
        return self.slice_index * share, (self.slice_index + 1) * share

    def redistribution(self, plan: Plan, number: int) -> Redistribution | None:
        """What travels between the slices of a bucket and what ranks step of it; None where that is the same."""
        return Redistribution.of(plan, number, self.slice_index) if self.by_slices else None

    def segments(self, plan: Plan) -> Iterator[Segment]:
        """The planned segments that this rank steps, bucket by bucket."""
        for number in range(len(plan.buckets)):
            yield from plan.segments(number, *self.stepped(plan, number))
