"""Arrays from the segments of one plan to those of another: bucket by bucket, gathered in one scratch buffer from which each
rank takes what is its own from now on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._C import Plan
from ..collectives import ControlGroup, Transport
from ..plan.buckets import PLANNING_ANEW
from ..plan.ownership import Ownership
from ..plan.params import ManagedParam, ParamState
from ..storage.bucket import Bucket
from ..storage.segment import BySegments, Segment
from .entries import Path, block_of, is_array, map_leaves


def move_arrays(
    sources: Sequence[BySegments],
    buckets: Sequence[Bucket],
    plan: Plan,
    ordered: Sequence[ManagedParam],
    ownership: Ownership,
    transport: Transport,
) -> dict[int, ParamState]:
    """Have every source forget what lies by the buckets' segments, and return what this rank's segments of `plan` get instead, by
    index of the parameter. Collective.

    Args:
        sources: that of each bucket.
        ordered: the parameters that the plan is for, in its order.
    """
    known = _describe_together(sources, buckets, transport.control)
    if not known:
        return {}
    wanted = {ordered[piece.param].index: piece for piece in ownership.segments(plan)}
    moved: dict[int, dict[Path, Tensor]] = {index: {} for index in wanted if index in known}
    scratch_bytes = max(bucket.padded_numel for bucket in buckets) * torch.float64.itemsize
    scratch = transport.allocate(scratch_bytes, torch.uint8, buckets[0].device)
    for source, bucket in zip(sources, buckets, strict=True):
        held = {segment: _leaves(source.arrays(segment)) for segment in bucket.segments}
        for segment in bucket.segments:
            source.forget(segment)
        leaves = {managed: _leaves(known.get(managed.index, {})) for managed in bucket.params}
        arrays = {path: leaf for one in leaves.values() for path, leaf in one.items() if isinstance(leaf, _Array)}
        for path, array in sorted(arrays.items(), key=lambda item: str(item[0])):
            full = scratch[: array.size(bucket.padded_numel) * array.dtype.itemsize].view(array.dtype)
            _gather_array(held, path, bucket, full, array, transport if ownership.by_slices else None)
            for managed in bucket.params:
                if isinstance(leaves[managed].get(path), _Array) and managed.index in wanted:
                    piece = wanted[managed.index]
                    begin = array.position(managed.offset + piece.start)
                    part = full[begin : begin + array.size(piece.numel)]
                    moved[managed.index][path] = part.to(bucket.master.home, copy=True)
    transport.free(scratch)
    return {index: map_leaves(known[index], partial(_put, arrays)) for index, arrays in moved.items()}


def hand_out(moved: dict[int, ParamState], buckets: Sequence[Bucket], sources: Sequence[BySegments]) -> None:
    """Let the sources of new buckets take what has been moved for their segments, which is then gone from `moved`."""
    for source, bucket in zip(sources, buckets, strict=True):
        for segment in bucket.segments:
            if segment.owner.index in moved:
                source.take(segment, moved.pop(segment.owner.index))


def _leaves(entry: ParamState) -> dict[Path, Any]:
    """What is in an entry, by where it lies."""
    found: dict[Path, Any] = {}
    map_leaves(entry, found.__setitem__)
    return found


def _put(arrays: Mapping[Path, Tensor], path: Path, leaf: Any) -> Any:
    return arrays.get(path, leaf)


@dataclass(frozen=True)
class _Array:
    """Stands for a state tensor with an element for each of the parameter's, or for each begun block of them."""

    dtype: torch.dtype
    block: int

    def size(self, numel: int) -> int:
        """Elements of it for so many of the parameter's."""
        return -(-numel // self.block)

    def position(self, element: int) -> int:
        """Where its element for one of the parameter's lies, which begins a block."""
        assert element % self.block == 0
        return element // self.block


def _describe_together(
    sources: Sequence[BySegments], buckets: Sequence[Bucket], control: ControlGroup
) -> dict[int, ParamState]:
    """What there is of each parameter, from the ranks that own a part of it. What is not an `_Array` is the value itself: step
    counts and the like, which an element-wise optimizer has alike for all parts."""
    mine = {
        segment.owner.index: map_leaves(entry, partial(_describe, segment))
        for source, bucket in zip(sources, buckets, strict=True)
        for segment in bucket.segments
        if (entry := source.arrays(segment))
    }
    return {index: entry for one in control.objects(mine, PLANNING_ANEW) for index, entry in one.items()}


def _describe(segment: Segment, path: Path, value: Any) -> Any:
    if is_array(path[0], value, segment):
        return _Array(value.dtype, block_of(path[0]))
    return value.clone() if isinstance(value, Tensor) else value  # a view would be pickled with its whole storage


def _gather_array(
    held: Mapping[Segment, dict[Path, Any]],
    path: Path,
    bucket: Bucket,
    full: Tensor,
    array: _Array,
    transport: Transport | None,
) -> None:
    """Fill `full` with one array of a bucket's state, and take it out of `held`. No transport: this rank has all of it."""
    begin, end = (array.position(element) for element in bucket.own_range)
    own = full[begin:end]
    for segment, leaves in held.items():
        if is_array(path[0], leaves.get(path), segment):
            first = array.position(segment.offset)
            own[first : first + array.size(segment.numel)].copy_(leaves.pop(path))
    if transport is not None:
        transport.start_rendezvous("moving state").finish()  # all are through with the array before
        # As bytes: not every backend knows 16-bit integers.
        gather = transport.start_all_gather(full.view(torch.uint8), label=f"state of {bucket.name}")
        transport.flush()
        gather.finish()
