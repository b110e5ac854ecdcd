"""What travels between the slices in which a bucket is cut evenly, and the ranges that ranks step of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .._C import Plan


@dataclass(frozen=True)
class Redistribution:
    """A bucket whose whole parameters lie across slices: their gradients go to the ranks that step them, and come back as parameters.

        slices           | 0      | 1      | 2      | 3    : |       for rank 1
        what ranks step  | 0   | 1              | 3      |   :       (:) padding, which nobody steps
                                  ▒▒▒▒▒▒▒▒▒                          its slice, to_owners {1: 9}
                               ░░░▒▒▒▒▒▒▒▒▒░░░░                      its range, from_slices {0: 3, 1: 9, 2: 4}

    Both are ranges of the bucket, in which the pieces follow one another without a gap. Elements are counted in the bucket.

    Attributes:
        slice_range: what ranks step of this rank's slice.
        own_range: what this rank steps.
        to_owners: elements of `slice_range` by the slice index of the rank that steps them, in rising order.
        from_slices: elements of `own_range` by the slice in which they lie, in rising order.
    """

    slice_range: tuple[int, int]
    own_range: tuple[int, int]
    to_owners: Mapping[int, int]
    from_slices: Mapping[int, int]

    @classmethod
    def of(cls, plan: Plan, number: int, slice_index: int) -> Redistribution | None:
        """That of a rank for one bucket of a plan; None where each rank steps its slice."""
        bucket = plan.buckets[number]
        if not bucket.owners:
            return None
        length = plan.shard_numel(number)
        begin, end = slice_index * length, (slice_index + 1) * length
        own = plan.own_range(number, slice_index)
        to_owners = {
            owner: numel
            for owner in dict.fromkeys(bucket.owners)
            if (numel := _overlap(plan.own_range(number, owner), (begin, end)))
        }
        first_slice, last_slice = own[0] // length, -(-own[1] // length)
        from_slices = {
            index: numel
            for index in range(first_slice, last_slice)
            if (numel := _overlap((index * length, (index + 1) * length), own))
        }
        begin = min(begin, bucket.offsets[-1] + bucket.numels[-1])  # the padding may fill more than one slice
        return cls((begin, begin + sum(to_owners.values())), own, to_owners, from_slices)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
