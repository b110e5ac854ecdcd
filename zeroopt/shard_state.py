"""Optimizer state by parameter and by shard: cutting whole state to this rank's pieces, and writing pieces out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .bucket import ManagedParam, ParamState, Segment
from .elementwise import is_per_element
from .errors import StateError


def cut_state(state: Mapping[str, Any], segment: Segment) -> ParamState:
    """The part of a whole parameter's state that belongs to a segment, copied.

    Tensors of the parameter's shape are cut and take the parameter's dtype and device, as torch does when it loads state, or
    float32 where parameters have masters; all else (step counts, scalars) is taken as it is. Of a parameter that stays
    whole, tensors of any shape are taken whole.
    """
    take = _take_whole if segment.owner.is_whole else _cut
    return {name: map_tensors(value, partial(take, name, segment)) for name, value in state.items()}


def _cut(name: str, segment: Segment, value: Tensor) -> Tensor:
    owner = segment.owner
    value = owner.local_part(value)
    if not is_per_element(name, value, owner.local):
        return value.clone()
    return _convert(owner.flatten(value)[segment.start : segment.start + segment.numel], segment)


def _take_whole(name: str, segment: Segment, value: Tensor) -> Tensor:
    return value.clone() if name == "step" or value.dim() == 0 else _convert(value, segment)


def _convert(value: Tensor, segment: Segment) -> Tensor:
    return value.to(segment.shard.device, segment.state_dtype if value.is_floating_point() else None, copy=True)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A value of state with each tensor in it replaced: some optimizers keep lists or dicts of them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(part, function) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(part, function) for part in value)
    return value


def pack_state(
    state: Mapping[Tensor, ParamState], segments: Iterable[Segment], params: Iterable[ManagedParam]
) -> tuple[dict[int, ParamState], dict[str, Any]]:
    """State of this rank's segments by position in the optimizer, and the layout that says what they are pieces of."""
    packed: dict[int, ParamState] = {}
    ranges: dict[int, list[int]] = {}
    for segment in segments:
        position = segment.owner.position
        ranges[position] = [segment.start, segment.start + segment.numel]
        if segment.shard in state:
            packed[position] = dict(state[segment.shard])
    by_position = sorted(params, key=lambda p: p.position)
    layout = {
        "ranges": dict(sorted(ranges.items())),
        "shapes": {p.position: list(p.shape) for p in by_position},
        "names": {p.position: p.name for p in by_position},
    }
    return dict(sorted(packed.items())), layout


def unpack_state(
    packed: Mapping[int, Mapping[str, Any]], layout: Mapping[str, Any] | None, segments: Iterable[Segment]
) -> dict[Tensor, ParamState]:
    """The inverse of `pack_state`; without a layout, `packed` is the state dict of a plain torch optimizer.

    Raises:
        StateError: the state belongs to other shapes or to another cut. Nothing has been changed.
    """
    result: dict[Tensor, ParamState] = {}
    segments = list(segments)
    if layout is not None:
        _check_owned(layout, segments)
    for segment in segments:
        position = segment.owner.position
        if layout is not None:
            check_cut(layout, segment.owner, segment.start, segment.numel)
        if position not in packed:
            continue
        entry = packed[position]
        if layout is None:
            if not segment.owner.is_whole:  # state of whole parameters has what shapes the optimizer likes
                _check_shapes(entry, segment.owner)
            result[segment.shard] = cut_state(entry, segment)
        else:
            device = segment.shard.device
            result[segment.shard] = {k: map_tensors(v, partial(_copy_to, device)) for k, v in entry.items()}
    return result


def _copy_to(device: torch.device, value: Tensor) -> Tensor:
    # A step count stays where torch keeps it, on the CPU.
    return value.to(device if value.dim() else value.device, copy=True)


def check_cut(layout: Mapping[str, Any], owner: ManagedParam, start: int, numel: int) -> None:
    """Raise StateError when a saved layout has other elements of a parameter than these."""
    shape = layout["shapes"].get(owner.position)
    if shape is None or list(shape) != list(owner.shape):
        raise StateError(f"the state dict has shape {shape} for parameter {owner.name!r} of shape {list(owner.shape)}")
    expected = [start, start + numel]
    saved = layout["ranges"].get(owner.position)
    if saved is None or list(saved) != expected:
        raise StateError(
            f"the state dict holds elements {saved} of parameter {owner.name!r}, but this rank owns {expected}: "
            "it was saved with another stage, bucket_mb or set of parameters; wrap with the options it was saved with"
        )


def _check_owned(layout: Mapping[str, Any], segments: Iterable[Segment]) -> None:
    mine = {segment.owner.position for segment in segments}
    for position, name in layout["names"].items():
        if position in layout["ranges"] and position not in mine:
            raise StateError(
                f"the state dict holds elements {layout['ranges'][position]} of parameter {name!r}, of which this rank "
                "owns none: it was saved with another stage, bucket_mb or set of parameters; wrap with the options it was "
                "saved with"
            )


def _check_shapes(entry: Mapping[str, Any], owner: ManagedParam) -> None:
    for name, value in entry.items():
        if isinstance(value, Tensor) and value.dim() > 0 and owner.local_part(value).shape != owner.shape:
            raise StateError(
                f"the state dict has {name!r} of shape {list(value.shape)} for parameter {owner.name!r} "
                f"of shape {list(owner.param.shape)}"
            )
