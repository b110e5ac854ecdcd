"""Buckets that grow where their padding would be too much: what is padded, when a bucket is closed, and what stays as it was."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from zeroopt._C import BucketPlan, Plan


class Inputs(NamedTuple):
    """Of a plan for parameters of one kind."""

    numels: list[int]
    item_bytes: int
    world_size: int
    alignment: int
    slice_alignment: int
    bucket_bytes: int
    padding_share: float
    padding_bytes: int

    def plan(self) -> Plan:
        count = len(self.numels)
        return Plan(
            self.numels,
            [0] * count,
            [self.item_bytes] * count,
            self.world_size,
            self.alignment,
            self.bucket_bytes,
            slice_alignment=self.slice_alignment,
            padding_share=self.padding_share,
            padding_bytes=self.padding_bytes,
        )

    @property
    def unit(self) -> int:
        return self.world_size * self.slice_alignment

    def is_within_limit(self, bucket: BucketPlan) -> bool:
        end = end_of(bucket)
        padding = bucket.padded_numel - end
        return padding <= self.padding_bytes // self.item_bytes or padding <= self.padding_share * max(end, 1)


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    return Inputs(
        draw(st.lists(st.integers(0, 300), min_size=1, max_size=40)),
        draw(st.sampled_from([2, 4, 8])),
        draw(st.integers(1, 12)),
        draw(st.sampled_from([1, 16, 5])),
        draw(st.sampled_from([1, 8, 3, 32])),
        draw(st.integers(1, 3000)),
        draw(st.sampled_from([0.01, 0.1, 0.5])),
        draw(st.sampled_from([0, 100])),
    )


def end_of(bucket: BucketPlan) -> int:
    return bucket.offsets[-1] + bucket.numels[-1]


@given(inputs())
def test_all_buckets_are_within_the_limit_or_there_is_one(given_inputs: Inputs) -> None:
    buckets = given_inputs.plan().buckets
    for bucket in buckets:
        assert bucket.padded_numel % given_inputs.unit == 0
        assert 0 <= bucket.padded_numel - end_of(bucket) < given_inputs.unit or end_of(bucket) == 0
        assert given_inputs.is_within_limit(bucket) or len(buckets) == 1


@given(inputs())
def test_parameters_lie_as_they_arrive(given_inputs: Inputs) -> None:
    buckets = given_inputs.plan().buckets
    assert [i for b in buckets for i in b.params] == list(reversed(range(len(given_inputs.numels))))
    for bucket in buckets:
        end = 0
        for offset, numel in zip(bucket.offsets, bucket.numels, strict=True):
            assert offset == -(-end // given_inputs.alignment) * given_inputs.alignment
            end = offset + numel


@given(inputs())
def test_no_bucket_is_larger_than_it_has_to_be(given_inputs: Inputs) -> None:
    """Without its last parameter a bucket was not beyond its size yet, or not within the limit. The last bucket may have been
    merged."""
    for bucket in given_inputs.plan().buckets[:-1]:
        if len(bucket.params) == 1 or end_of(bucket) * given_inputs.item_bytes <= given_inputs.bucket_bytes:
            continue
        before = bucket.offsets[-2] + bucket.numels[-2]
        padding = -(-max(before, 1) // given_inputs.unit) * given_inputs.unit - before
        allowed = max(
            given_inputs.padding_bytes // given_inputs.item_bytes, given_inputs.padding_share * max(before, 1)
        )
        assert padding > allowed


@given(inputs())
def test_without_a_limit_buckets_have_the_size_that_was_asked_for(given_inputs: Inputs) -> None:
    for bucket in given_inputs._replace(padding_share=float("inf")).plan().buckets:
        assert len(bucket.params) == 1 or end_of(bucket) * given_inputs.item_bytes <= given_inputs.bucket_bytes
