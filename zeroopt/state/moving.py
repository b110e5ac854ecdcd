"""Arrays from the segments of one plan to those of another: bucket by bucket, and of a large bucket stripe by stripe, gathered in
one scratch buffer from which each rank takes what is its own from now on.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..collectives import ControlGroup, Transport
from ..collectives.merging import merge
from ..pages import paged_zeros
from ..plan.buckets import PLANNING_ANEW
from ..plan.ownership import Ownership
from ..plan.params import ParamState
from ..storage.bucket import Bucket
from ..storage.segment import BySegments, Segment
from ..storage.stripe import Stripe, cut_in_stripes
from .entries import Path, block_of, is_array, map_leaves
from .sent import Sent


class Extent(Protocol):
    """Some elements of a parameter, side by side.

    Attributes:
        start: the first of them.
    """

    @property
    def start(self) -> int: ...

    @property
    def numel(self) -> int: ...


def move_arrays(
    sources: Sequence[BySegments],
    buckets: Sequence[Bucket],
    wanted: Mapping[int, Extent],
    ownership: Ownership,
    transport: Transport,
    scratch_bytes: int,
) -> dict[int, ParamState]:
    """Have every source forget what lies by the buckets' segments, and return what this rank gets instead, by index of the
    parameter. Collective.

    Args:
        sources: that of each bucket.
        wanted: the segments that this rank is to have, by index of the parameter.
        scratch_bytes: about how much memory it may take besides.
    """
    known = _describe_together(sources, buckets, transport.control)
    if not known:
        return {}
    moved: dict[int, dict[Path, Tensor]] = {index: {} for index in wanted if index in known}
    scratch = _Scratch(scratch_bytes, buckets, ownership, transport)
    for source, bucket in zip(sources, buckets, strict=True):
        held = {segment: _leaves(source.arrays(segment)) for segment in bucket.segments}
        for segment in bucket.segments:
            source.forget(segment)
        leaves = {managed: _leaves(known.get(managed.index, {})) for managed in bucket.params}
        arrays = {path: leaf for one in leaves.values() for path, leaf in one.items() if isinstance(leaf, _Array)}
        mine = {managed: wanted[managed.index] for managed in bucket.params if managed.index in moved}
        for path, array in sorted(arrays.items(), key=lambda item: str(item[0])):
            for managed, piece in mine.items():
                if isinstance(leaves[managed].get(path), _Array):
                    moved[managed.index][path] = paged_zeros(array.size(piece.numel), array.dtype, bucket.home)
            for stripe in scratch.stripes(bucket):
                full = scratch.gather(held, path, array, bucket, stripe)
                for owner, start, offset, numel in stripe.pieces(bucket.params):
                    if owner in mine and path in moved[owner.index]:
                        _take_over(moved[owner.index][path], mine[owner], full, array, start, offset, numel)
            for part in held.values():
                part.pop(path, None)
        source.let_go()
    scratch.free()
    home = buckets[0].home
    return {index: map_leaves(known[index], partial(_put, arrays, home)) for index, arrays in moved.items()}


def _take_over(
    target: Tensor, wanted: Extent, full: Tensor, array: _Array, start: int, offset: int, numel: int
) -> None:
    """Copy what a segment gets of elements [start, start + numel) of its parameter, which lie in `full` from `offset` on."""
    first, last = max(start, wanted.start), min(start + numel, wanted.start + wanted.numel)
    if first < last:
        source, to, count = (
            array.position(offset + first - start),
            array.position(first - wanted.start),
            array.size(last - first),
        )
        target[to : to + count].copy_(full[source : source + count])


class _Scratch:
    """A buffer in which the ranks put together a bucket of an array, stripe by stripe."""

    def __init__(self, num_bytes: int, buckets: Sequence[Bucket], ownership: Ownership, transport: Transport) -> None:
        self._ownership = ownership
        self._transport = transport
        self._num_slices = ownership.num_slices if ownership.by_slices else 1
        unit = self._num_slices * max(bucket.precision.alignment for bucket in buckets)
        widest = torch.float64.itemsize
        self._most = max(1, num_bytes // widest // unit) * unit
        largest = max(min(bucket.padded_numel, self._most) for bucket in buckets)
        self._buffer = transport.allocate(largest * widest, torch.uint8, buckets[0].device)

    def stripes(self, bucket: Bucket) -> list[Stripe]:
        """The parts of a bucket that fit."""
        return cut_in_stripes(bucket.padded_numel, self._num_slices, self._most)

    def gather(
        self, held: Mapping[Segment, dict[Path, Any]], path: Path, array: _Array, bucket: Bucket, stripe: Stripe
    ) -> Tensor:
        """One stripe of one array of a bucket's state. Collective.

        Args:
            held: what this rank has of it.
        """
        full = self._buffer[: array.size(stripe.numel) * array.dtype.itemsize].view(array.dtype)
        length = stripe.end - stripe.begin
        place = self._ownership.slice_index * length if self._ownership.by_slices else 0
        for segment, leaves in held.items():
            values = leaves.get(path)
            first, last = max(stripe.begin, segment.offset), min(stripe.end, segment.offset + segment.numel)
            if first < last and isinstance(values, Tensor) and is_array(path[0], values, segment):
                to, source, count = (
                    array.position(place + first - stripe.begin),
                    array.position(first - segment.offset),
                    array.size(last - first),
                )
                full[to : to + count].copy_(segment.flatten(values)[source : source + count])
        if self._ownership.by_slices:
            self._transport.start_rendezvous("moving state").finish()  # all are through with the stripe before
            # As bytes: not every backend knows 16-bit integers.
            gather = self._transport.start_all_gather(full.view(torch.uint8), label=f"state of {bucket.name}")
            self._transport.flush()
            gather.finish()
        return full

    def free(self) -> None:
        """Give the buffer up."""
        self._transport.free(self._buffer)


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


def _put(arrays: Mapping[Path, Tensor], home: torch.device, path: Path, leaf: Any) -> Any:
    if isinstance(leaf, Sent):
        return leaf.at(home)
    return arrays[path] if path in arrays else deepcopy(leaf)  # which other parameters have, too


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
    """What there is of each parameter, from the ranks that own a part of it. What is not an `_Array` is the value itself, a tensor
    as `Sent`: step counts and the like, which an element-wise optimizer has alike for all parts."""
    mine = {
        segment.owner.index: map_leaves(entry, partial(_describe, segment))
        for source, bucket in zip(sources, buckets, strict=True)
        for segment in bucket.segments
        if (entry := source.arrays(segment))
    }
    count = 1 + max((managed.index for bucket in buckets for managed in bucket.params), default=-1)
    return merge(mine, count, _digest, control, PLANNING_ANEW)


def _describe(segment: Segment, path: Path, value: Any) -> Any:
    if is_array(path[0], value, segment):
        return _Array(value.dtype, block_of(path[0]))
    return Sent.of(value) if isinstance(value, Tensor) else value


def _digest(entry: ParamState) -> int:
    """From 1 to 2**62, the same for what is alike to the last bit."""

    def digest_of(_: Path, leaf: Any) -> str:
        return leaf.digest() if isinstance(leaf, Sent) else hashlib.sha256(pickle.dumps(leaf)).hexdigest()

    text = repr(map_leaves(entry, digest_of))
    return 1 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 2**62
