"""Buckets in the order in which gradients arrive: planned once more, after the first step, as DistributedDataParallel does.

The first plan takes the parameters in reverse order, which is only a guess at the order in which backward yields their
gradients. Where it was wrong, a bucket waits for a gradient that comes late, and those behind it wait with it. What the
ranks own changes with the plan, so their state moves: bucket by bucket, gathered in one scratch buffer from which each rank
takes what is its own from now on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map_with_path

from . import _C
from .bucket import Bucket, ManagedParam, ParamState, Segment, own_segments
from .collectives import Transport, named_failures
from .shard_state import block_of, is_array

_log = logging.getLogger("zeroopt")

_WHAT = "planning the buckets anew, after the first step"  # for messages


def agree_on_order(arrivals: Sequence[int], params: Sequence[ManagedParam], group: dist.ProcessGroup) -> list[int]:
    """Indices of the parameters as gradients arrived on rank 0; those that did not come last, in the order of the plan.

    Collective.
    """
    came = set(arrivals)
    late = [managed.index for managed in reversed(params) if managed.index not in came]
    order = torch.tensor([*arrivals, *late], dtype=torch.int64, device=params[0].param.device)
    with named_failures(_WHAT, group):
        dist.broadcast(order, dist.get_global_rank(group, 0), group=group)
    return [int(index) for index in order.tolist()]


def in_order(params: Sequence[ManagedParam], order: Sequence[int]) -> list[ManagedParam]:
    """Parameters as the planner takes them, which goes through them from the last one on."""
    return [params[index] for index in reversed(order)]


def is_grouped_alike(buckets: Sequence[Bucket], plan: _C.Plan, ordered: Sequence[ManagedParam]) -> bool:
    """Whether a plan puts the same parameters into the same buckets, in whatever order within a bucket."""
    before = [{managed.index for managed in bucket.params} for bucket in buckets]
    after = [{ordered[i].index for i in layout.params} for layout in plan.buckets]
    return before == after


def log_new_plan(
    buckets: Sequence[Bucket], plan: _C.Plan, ordered: Sequence[ManagedParam], transport: Transport
) -> None:
    """Say on rank 0, with level DEBUG, what changes."""
    if transport.group.rank() == 0:
        first = [ordered[i].name for i in plan.buckets[0].params]
        _log.debug(
            "%d buckets are planned anew, as %d, in the order in which gradients arrive: bucket 0 was of %s … %s, and will be of "
            "%s … %s",
            len(buckets),
            len(plan.buckets),
            *(buckets[0].params[0].name, buckets[0].params[-1].name, first[0], first[-1]),
        )


def move_state(
    state: MutableMapping[Tensor, ParamState],
    buckets: Sequence[Bucket],
    plan: _C.Plan,
    ordered: Sequence[ManagedParam],
    transport: Transport,
    *,
    shard_state: bool,
) -> dict[int, ParamState]:
    """Take all entries of the buckets' segments out of `state`, and return what this rank's segments of `plan` get instead,
    by index of the parameter. Collective."""
    own: dict[Tensor, ParamState] = {
        s.shard: state.pop(s.shard) for bucket in buckets for s in bucket.segments if s.shard in state
    }
    known = _describe_together(own, buckets, transport.group)
    leaves: dict[Tensor, ParamState] = {shard: _leaves(entry) for shard, entry in own.items()}
    own.clear()
    pieces = [p for b in range(len(plan.buckets)) for p in own_segments(plan, b, transport, shard_state=shard_state)]
    wanted = {ordered[piece.param].index: piece for piece in pieces}
    moved: dict[int, ParamState] = {index: {} for index in wanted if index in known}
    scratch_bytes = max(bucket.padded_numel for bucket in buckets) * torch.float64.itemsize
    scratch = transport.allocate(scratch_bytes, torch.uint8, buckets[0].device)
    for bucket in buckets:
        described = {m.index: _leaves(known[m.index]) for m in bucket.params if m.index in known}
        arrays = {n: v for entry in described.values() for n, v in entry.items() if isinstance(v, _Array)}
        for name, array in sorted(arrays.items()):
            full = scratch[: array.size(bucket.padded_numel) * array.dtype.itemsize].view(array.dtype)
            _gather_array(leaves, name, bucket, full, array, transport if shard_state else None)
            for managed in bucket.params:
                if isinstance(described.get(managed.index, {}).get(name), _Array) and managed.index in wanted:
                    piece = wanted[managed.index]
                    begin = array.position(managed.offset + piece.start)
                    moved[managed.index][name] = full[begin : begin + array.size(piece.numel)].clone()
    transport.free(scratch)
    return {index: _with_leaves(known[index], arrays) for index, arrays in moved.items()}


def _leaves(entry: ParamState) -> ParamState:
    """What is in a parameter's state, by name, or where some optimizers keep containers, by the way to it: "means.0"."""
    return {_name(path): leaf for path, leaf in tree_flatten_with_path(entry)[0]}


def _with_leaves(entry: ParamState, replaced: ParamState) -> ParamState:
    """State with some of its leaves replaced, by their names."""
    changed: ParamState = tree_map_with_path(lambda path, leaf: replaced.get(_name(path), leaf), entry)
    return changed


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


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
    state: Mapping[Tensor, ParamState], buckets: Sequence[Bucket], group: dist.ProcessGroup
) -> dict[int, ParamState]:
    """What state each parameter has, from the ranks that own a part of it. What is not an `_Array` is the value itself: step
    counts and the like, which an element-wise optimizer has alike for all parts."""
    mine = {}
    for segment in (segment for bucket in buckets for segment in bucket.segments):
        if segment.shard in state:
            entry = state[segment.shard]
            described = {name: _describe(name, value, segment) for name, value in _leaves(entry).items()}
            mine[segment.owner.index] = _with_leaves(entry, described)
    everyone: list[dict[int, ParamState]] = [{}] * group.size()
    with named_failures(_WHAT, group):
        dist.all_gather_object(everyone, mine, group=group)
    return {index: entry for one in everyone for index, entry in one.items()}


def _describe(name: str, value: Any, segment: Segment) -> Any:
    if is_array(name, value, segment):
        return _Array(value.dtype, block_of(name))
    return value.clone() if isinstance(value, Tensor) else value  # a view would be pickled with its whole storage


def _gather_array(
    leaves: Mapping[Tensor, ParamState],
    name: str,
    bucket: Bucket,
    full: Tensor,
    array: _Array,
    transport: Transport | None,
) -> None:
    """Fill `full` with one array of a bucket's state, and take it out of the leaves. No transport: this rank has all of it."""
    begin, end = (array.position(element) for element in bucket.own_range)
    own = full[begin:end]
    for segment in bucket.segments:
        entry = leaves.get(segment.shard, {})
        if is_array(name, entry.get(name), segment):
            first = array.position(segment.offset)
            own[first : first + array.size(segment.numel)].copy_(entry.pop(name))
    if transport is not None:
        transport.start_rendezvous("moving state").finish()  # all are through with the array before
        # As bytes: not every backend knows 16-bit integers.
        gather = transport.start_all_gather(full.view(torch.uint8), label=f"state of {bucket.name}")
        transport.flush()
        gather.finish()
