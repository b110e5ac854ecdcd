"""Stripes cover every bucket once, and say what lies where in their buffers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from lone_slice import LoneSlice, buckets_of, params_of

from zeroopt.storage.stripe import cut_in_stripes


@given(st.integers(1, 8), st.integers(1, 60), st.integers(1, 600))
def test_they_cover_every_element_once_and_are_no_larger_than_asked_for(
    num_slices: int, slice_numel: int, most: int
) -> None:
    padded = num_slices * slice_numel
    stripes = cut_in_stripes(padded, num_slices, most)
    seen = torch.zeros(padded, dtype=torch.int64)
    for stripe in stripes:
        assert stripe.numel <= max(most, num_slices)
        filled = torch.zeros(stripe.numel, dtype=torch.int64)
        for begin, end, offset in stripe.ranges():
            seen[begin:end] += 1
            filled[offset : offset + end - begin] += 1
        assert torch.all(filled == 1)
    assert torch.all(seen == 1)
    assert [stripe.is_first for stripe in stripes] == [True] + [False] * (len(stripes) - 1)
    assert stripes[0].is_whole is (len(stripes) == 1)


@given(st.lists(st.integers(1, 80), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 300))
def test_pieces_are_the_parameters_elements(sizes: list[int], num_slices: int, most: int) -> None:
    params = params_of(*(torch.arange(size, dtype=torch.float32) for size in sizes))
    (bucket,) = buckets_of(params, LoneSlice(num_slices))
    found = {managed: torch.full((managed.numel,), -1.0) for managed in params}
    for stripe in cut_in_stripes(bucket.padded_numel, num_slices, most):
        full = torch.cat([bucket.flat_param[begin:end] for begin, end, _ in stripe.ranges()])
        last = 0
        for owner, start, offset, numel in stripe.pieces(bucket.params):
            assert offset >= last
            last = offset + numel
            found[owner][start : start + numel] = full[offset:last]
    for managed in params:
        assert torch.equal(found[managed], managed.local)
