"""The state of this rank's segments as it stands in a state dict."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor

from .. import ops
from ..plan.params import ManagedParam, ParamState
from ..plan.regions import FlatLayout
from ..probing.probe import is_per_element
from ..storage.segment import Segment
from .shard_tensor import ShardTensor

OUTER = "outer"
"""Under which name a parameter's entry has what belongs to outer steps."""

Path = tuple[Any, ...]
"""Where a value lies in a parameter's entry; most optimizers have them at the top, by name."""


def map_leaves(value: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """A value of state with everything in it replaced that is no dict, list or tuple: some optimizers keep tensors in those."""
    if isinstance(value, dict):
        return {name: map_leaves(part, function, (*path, name)) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return sequence_like(value, [map_leaves(part, function, (*path, i)) for i, part in enumerate(value)])
    return function(path, value)


def sequence_like(value: Any, parts: Sequence[Any]) -> Any:
    """A list or tuple of other parts; named tuples take them one by one."""
    return value._make(parts) if hasattr(value, "_make") else type(value)(parts)


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A value of state with each tensor in it replaced."""
    return map_leaves(value, lambda _, leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def on_cpu(value: Any) -> Any:
    """A value, or dicts, lists and tuples of some, with all tensors on the CPU; what is there already stays the same object."""
    if isinstance(value, Tensor):
        return value if value.is_cpu else value.detach().cpu()
    if isinstance(value, dict):
        parts = {name: on_cpu(part) for name, part in value.items()}
        if all(part is value[name] for name, part in parts.items()):
            return value
        moved = copy(value)  # of its class, with whatever else that knows
        moved.update(parts)
        return moved
    if isinstance(value, (list, tuple)):
        listed = [on_cpu(part) for part in value]
        return value if all(map(operator.is_, listed, value)) else sequence_like(value, listed)
    return value


def block_of(name: str) -> int:
    """Elements of the parameter for which a state tensor of that name has one."""
    return ops.QUANT_BLOCK if name in ops.SCALES else 1


def is_array(name: str, value: Any, segment: Segment) -> bool:
    """Whether a state entry has an element for each of the segment's, or for each block of them."""
    return isinstance(value, Tensor) and (block_of(name) > 1 or is_per_element(name, value, segment.shard))


def pack_state(
    state: Mapping[Tensor, ParamState], segments: Iterable[Segment], params: Iterable[ManagedParam]
) -> dict[int, ParamState]:
    """State by position in the optimizer: of this rank's segments, and an empty entry for each other parameter, so that all
    ranks have the same positions."""
    packed: dict[int, ParamState] = {managed.position: {} for managed in params}
    for segment in segments:
        entry = state.get(segment.shard, {})
        packed[segment.owner.position] = {name: pack_value(name, value, segment) for name, value in entry.items()}
    return dict(sorted(packed.items()))


def pack_value(name: str, value: Any, segment: Segment) -> Any:
    """A value of a segment's state: tensors with an element for each of the parameter's in the parameter's shape, as
    `ShardTensor`s where the segment is not all of it."""
    return map_tensors(value, partial(_pack_tensor, name, segment))


def _pack_tensor(name: str, segment: Segment, value: Tensor) -> Tensor:
    owner = segment.owner
    if not is_array(name, value, segment):
        return value
    if block_of(name) > 1:
        return _pack_blocks(value, segment)
    layout = owner.flat_layout
    if layout.is_part or segment.numel < owner.numel:
        return ShardTensor(layout, segment.start, value if value.dim() == 1 else owner.flatten(value))
    return value.as_strided(owner.shape, owner.stride)


def _pack_blocks(scales: Tensor, segment: Segment) -> Tensor:
    num_blocks = ops.num_blocks(segment.owner.numel)
    if scales.numel() == num_blocks:
        return scales
    return ShardTensor(FlatLayout.of([num_blocks], [1]), segment.start // ops.QUANT_BLOCK, scales)
