"""What a rank writes of a wrapped model and its optimizers: its own part, as named tensors of their true shapes.

    model.<name>                        parameters, as exact as they are kept, buffers and whatever else the model saves
    optimizer.state.<name>.<state>      state of the parameter of that name; 8-bit moments decoded, and beside them their scales
    optimizer.state.<name>.outer.<state>  the anchor of outer steps, and the outer optimizer's state
    optimizer.param_groups.<i>.<option>

These are the names under which torch.distributed.checkpoint saves and loads
`{"model": get_model_state_dict(m), "optimizer": get_optimizer_state_dict(m, o)}` of a plain model and torch's optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...plan.dtensors import is_distributed
from ...plan.regions import FlatLayout
from ...state.entries import block_of, is_array, map_tensors
from ...state.shard_tensor import ShardTensor
from ...state.tiers import decode, is_coded
from ...storage.bucket import Bucket
from ...storage.masters import MASTER_NAMES
from ...storage.segment import Segment

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """A parameter's name without what torch.compile and torch's wrapper for activation checkpointing have put into it, as torch's own
    checkpoints have it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def model_contents(model: ZeroDataParallel, *, trained_only: bool = False, frozen: bool = True) -> dict[str, Any]:
    """What this rank writes of a model, by name. Live tensors.

    Args:
        trained_only: of its state dict, only parameters that optimizers train.
        frozen: parameters that they do not train, too.
    """
    parts = {s.owner.param: _exact_part(bucket, s, r) for bucket, s, r in _parts(model.replica.buckets, model)}
    managed = {m.param for m in model.replica.params}
    rank, size = model.replica.transport.control.rank, model.replica.transport.control.size
    contents: dict[str, Any] = {}
    for number, (name, value) in enumerate(model.module.state_dict(keep_vars=True).items()):
        if isinstance(value, nn.Parameter) and value in managed:
            if value in parts or value.numel() == 0:  # of no elements no rank has a part
                contents[clean_name(name)] = parts.get(value, value.detach())
        elif trained_only or (isinstance(value, nn.Parameter) and not frozen):
            continue
        elif is_distributed(value) or rank == (number % size if isinstance(value, nn.Parameter) else 0):
            # Of a DTensor every rank has another part; buffers, which ranks may have different ones of, are those of the first.
            contents[clean_name(name)] = value.detach() if isinstance(value, Tensor) else value
    return contents


def state_contents(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """What this rank writes of an optimizer's state, by the name of the parameter. Live tensors. Collective over the average group
    where there are outer steps."""
    state = optimizer.state_dicts.saved_state()
    contents: dict[str, Any] = {}
    for _, segment, part in _parts(optimizer.state_dicts.buckets, optimizer):
        entry = state.get(segment.shard)
        if entry is not None:
            contents[clean_name(segment.owner.name)] = dict(_entry_contents(entry, segment, part))
    if optimizer.replica.transport.control.rank == 0:
        names = optimizer.names()
        contents |= {clean_name(names[p]): entry for p, entry in optimizer.state_dicts.idle_state().items()}
    return contents


_Range = tuple[int, int]
"""First and last element of a segment, counted in the segment."""


def _parts(
    buckets: Sequence[Bucket], owner: ZeroDataParallel | ZeroOptimizer
) -> Iterator[tuple[Bucket, Segment, _Range]]:
    """The parts of segments that this rank writes: all of them where ranks have different ones, else its slice's share."""
    for bucket in buckets:
        begin, end = owner.replica.ownership.written(bucket.own_range)
        for segment in bucket.segments:
            first = max(begin - segment.offset, 0)
            last = min(end - segment.offset, segment.numel)
            if segment.owner.is_whole:  # by who has its first element
                first, last = (0, segment.numel) if begin <= segment.offset < end else (0, 0)
            if first < last:
                yield bucket, segment, (first, last)


def _exact_part(bucket: Bucket, segment: Segment, part: _Range) -> Tensor:
    """Parameters as exactly as they are kept."""
    first, last = part
    begin, end = segment.offset + first, segment.offset + last
    master, layout, start = bucket.master, segment.owner.flat_layout, segment.start + first
    if master.is_stored:
        return ShardTensor(layout, start, master.exact(begin, end))

    def read(first: int, last: int) -> Tensor:
        return master.exact(begin + first, begin + last)

    return ShardTensor(layout, start, master.param[begin:end], read, dtype=master.dtype)


def _entry_contents(entry: Mapping[str, Any], segment: Segment, part: _Range) -> Iterator[tuple[str, Any]]:
    for name, value in entry.items():
        if name in MASTER_NAMES:
            continue  # the model's parameters are saved as exact as with these
        if is_coded(name, entry):
            yield name, _decoded_part(value, entry[name + ops.SCALE_SUFFIX], segment, part)
        elif block_of(name) > 1:
            if not segment.owner.flat_layout.is_part:  # blocks of other parts of a DTensor would have the same numbers
                yield name, _scales_part(value, segment, part)
        else:
            yield name, map_tensors(value, partial(_array_part, name, segment, part))


def _array_part(name: str, segment: Segment, part: _Range, value: Tensor) -> Tensor:
    if segment.owner.is_whole or not is_array(name, value, segment):
        return value  # what all ranks have alike, such as a step count, is written once
    return ShardTensor(segment.owner.flat_layout, segment.start + part[0], value[part[0] : part[1]])


def _decoded_part(codes: Tensor, scales: Tensor, segment: Segment, part: _Range) -> Tensor:
    owner, (first, last) = segment.owner, part
    flat = owner.flatten(codes) if owner.is_whole else codes

    def read(begin: int, end: int) -> Tensor:
        return decode(flat, scales, first + begin, first + end)

    return ShardTensor(owner.flat_layout, segment.start + first, flat[first:last], read, dtype=torch.float32)


def _scales_part(scales: Tensor, segment: Segment, part: _Range) -> Tensor:
    first, last = part[0] // ops.QUANT_BLOCK, ops.num_blocks(part[1])
    layout = FlatLayout.of([ops.num_blocks(segment.owner.numel)], [1])
    return ShardTensor(layout, segment.start // ops.QUANT_BLOCK + first, scales[first:last])
