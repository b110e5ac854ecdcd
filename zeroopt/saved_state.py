"""From saved state to the state of this rank's segments, whoever saved it: a plain torch optimizer, or any ranks of any run.

State dicts are taken one after the other, and of each only what this rank needs is copied, so one that is read when it is
asked for takes no more memory than that. Nothing of the optimizer changes here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .bucket import MASTER_NAMES, ManagedParam, ParamState, Segment
from .elementwise import is_per_element
from .errors import StateError
from .local_tensor import is_distributed
from .shard_layout import ShardLayout
from .shard_state import block_of, map_tensors
from .shard_tensor import ShardTensor

_ADVICE = (
    "give load_state_dict what state_dict() gave on every rank of that run, as in "
    "optimizer.load_state_dict([torch.load(f'optimizer-{rank}.pt', mmap=True) for rank in range(world_size)])"
)

Path = tuple[str, ...]
"""Where a tensor lies in a parameter's entry; most optimizers have them at the top, by name."""


class SavedState:
    """Collects the state of some segments from state dicts.

    Args:
        segments: those of this rank.
        params: all that the optimizer trains.
        part: which part of the parameters the rank holds; see `local_tensor.place_in_mesh`.
        live: state that there is now, whose dtypes are kept.
        keeps: whether tensors that are what is needed may be kept; else all are copied.
    """

    def __init__(
        self,
        segments: Iterable[Segment],
        params: Sequence[ManagedParam],
        part: str,
        live: Mapping[Tensor, Mapping[str, Any]],
        *,
        keeps: bool = False,
    ) -> None:
        self._segments = {segment.owner.position: segment for segment in segments}
        self._params = {managed.position: managed for managed in params}
        self._part = part
        self._live = live
        self._keeps = keeps
        self._state: dict[int, ParamState] = {}
        self._arrays: dict[tuple[int, Path], _Array] = {}
        self._absent: set[int] = set()  # of which some rank says that it has no part
        self._known: set[int] = set()  # of which some rank says what there is, or that there is nothing

    def take(self, state_dict: Mapping[str, Any]) -> None:
        """Copy what this rank needs from one state dict.

        Raises:
            StateError: it belongs to other parameters, or is not of a format that this version knows.
        """
        layout = ShardLayout.of(state_dict)
        self._check_shapes(layout)
        positions = _positions(state_dict)
        entries = {positions.get(key, key): entry for key, entry in state_dict["state"].items()}
        beyond = {} if layout is None else layout.beyond_torch
        for position, segment in self._segments.items():
            entry = entries.get(position)
            if layout is not None and entry is not None and not entry:
                self._absent.add(position)
                continue
            self._known.add(position)
            if entry is None and position not in beyond:
                continue
            self._take_entry(segment, {**(entry or {}), **beyond.get(position, {})}, layout)

    def finish(self) -> dict[Tensor, ParamState]:
        """The state of each segment that has any.

        Raises:
            StateError: elements of this rank were in none of the state dicts.
        """
        for position in self._absent - self._known:
            owner = self._segments[position].owner
            raise StateError(
                f"the state dict holds nothing of parameter {owner.name!r}, of which another rank had a part; {_ADVICE}"
            )
        for (position, path), array in self._arrays.items():
            self._check_complete(self._segments[position], path, array)
        return {self._segments[position].shard: entry for position, entry in self._state.items()}

    def _check_shapes(self, layout: ShardLayout | None) -> None:
        if layout is None:
            return
        for position, shape in layout.shapes.items():
            managed = self._params.get(position)
            if managed is not None and shape != list(managed.shape):
                raise StateError(
                    f"the state dict has shape {shape} for parameter {managed.name!r} of shape {list(managed.shape)}"
                )

    def _take_entry(self, segment: Segment, entry: Mapping[str, Any], layout: ShardLayout | None) -> None:
        result = self._state.setdefault(segment.owner.position, {})
        for name, value in entry.items():
            result[name] = _map_paths((name,), value, partial(self._take_tensor, segment, layout))

    def _take_tensor(self, segment: Segment, layout: ShardLayout | None, path: Path, value: Tensor) -> Tensor:
        owner, name = segment.owner, path[-1]
        if owner.is_whole and name not in MASTER_NAMES.values():
            return value.clone() if name == "step" or value.dim() == 0 else self._converted(segment, path, value)
        piece = self._find_piece(owner, name, value, layout)
        if piece is None:  # a step count stays where torch keeps it, on the CPU
            return value.to(segment.shard.device if value.dim() else value.device, copy=True)
        block = block_of(name)
        key = (owner.position, path)
        if key not in self._arrays:
            needed = (
                segment.start // block,
                -(-segment.numel // block),
                self._dtype(segment, path, value.dtype, layout),
            )
            first, elements = piece
            if self._keeps and needed == (first, elements.numel(), elements.dtype):
                values = elements
            else:
                values = torch.empty(needed[1], dtype=needed[2], device=segment.shard.device)
            self._arrays[key] = _Array(values, needed[0])
        array = self._arrays[key]
        array.fill(*piece)
        return array.values if not owner.is_whole else array.values.as_strided(owner.shape, owner.stride)

    def _find_piece(
        self, owner: ManagedParam, name: str, value: Tensor, layout: ShardLayout | None
    ) -> tuple[int, Tensor] | None:
        """The first of the parameter's elements (or blocks) that a tensor has, and its elements, 1-D; None for what has no
        element for each of the parameter's."""
        if isinstance(value, ShardTensor):
            if value.flat_layout.full_shape != owner.flat_layout.full_shape and block_of(name) == 1:
                raise StateError(
                    f"the state dict has {name!r} of shape {list(value.shape)} for parameter {owner.name!r} of shape "
                    f"{list(owner.param.shape)}"
                )
            if value.flat_layout.corner != owner.flat_layout.corner and block_of(name) == 1:
                raise StateError(
                    f"the state dict has another part of the DTensor {owner.name!r}; load it through zeroopt.checkpoint"
                )
            return value.start, value.local
        block = block_of(name)
        saved = None if layout is None else layout.ranges.get(owner.position)
        if saved is not None and value.dim() == 1 and name != "step":
            start, stop = saved[0] // block, -(-saved[1] // block)
            if value.numel() == stop - start:
                self._check_part(owner, value, layout)
                return start, value
        local = owner.local_part(value)
        if block > 1:
            return 0, local
        if is_per_element(name, local, owner.local):
            self._check_part(owner, value, layout)
            return 0, owner.flatten(local)
        if local.dim() > 0 and layout is None:
            raise StateError(
                f"the state dict has {name!r} of shape {list(value.shape)} for parameter {owner.name!r} of shape "
                f"{list(owner.param.shape)}"
            )
        return None

    def _check_part(self, owner: ManagedParam, value: Tensor, layout: ShardLayout | None) -> None:
        """Local tensors of a DTensor do not say which part they are."""
        if layout is not None and owner.flat_layout.is_part and not is_distributed(value) and layout.part != self._part:
            raise StateError(
                f"the state dict was saved with part={layout.part}, this optimizer has part={self._part}: a shard has local "
                "tensors of its rank; zeroopt.checkpoint loads into any mesh"
            )

    def _converted(self, segment: Segment, path: Path, value: Tensor) -> Tensor:
        return value.to(segment.shard.device, self._dtype(segment, path, value.dtype, None), copy=True)

    def _dtype(self, segment: Segment, path: Path, dtype: torch.dtype, layout: ShardLayout | None) -> torch.dtype:
        """As torch does, floating-point state takes the dtype that belongs to the parameter, but not where it is known to have
        another one: in state that is there, or in the run that saved it with parameters like these."""
        if not dtype.is_floating_point or path[-1] in MASTER_NAMES.values() or block_of(path[-1]) > 1:
            return dtype
        live = self._live.get(segment.shard, {}).get(path[0]) if len(path) == 1 else None
        if isinstance(live, Tensor) and live.is_floating_point():
            return live.dtype
        stored = segment.owner.local.dtype
        if layout is not None and layout.dtypes.get(segment.owner.position) == str(stored):
            return dtype
        return segment.state_dtype

    def _check_complete(self, segment: Segment, path: Path, array: _Array) -> None:
        gap = array.first_gap()
        if gap is not None:
            owner, block = segment.owner, block_of(path[-1])
            end = min(gap[1] * block, owner.numel)
            raise StateError(
                f"the state dict lacks elements {gap[0] * block} to {end} of {'.'.join(path)!r} of parameter {owner.name!r}, of "
                f"which this rank owns {segment.start} to {segment.start + segment.numel}; {_ADVICE}"
            )


@dataclass
class _Array:
    """Elements of one array of state that this rank needs, and which of them have come.

    Attributes:
        values: 1-D.
        start: the first of the parameter's elements (or blocks) that is in `values`.
    """

    values: Tensor
    start: int
    _filled: list[tuple[int, int]] = field(default_factory=list)

    def fill(self, first: int, elements: Tensor) -> None:
        """Take what is needed from elements of which the first is number `first`."""
        begin = max(first, self.start)
        end = min(first + elements.numel(), self.start + self.values.numel())
        if begin < end:
            if elements is not self.values:
                self.values[begin - self.start : end - self.start].copy_(elements[begin - first : end - first])
            self._filled.append((begin, end))

    def first_gap(self) -> tuple[int, int] | None:
        """The first range that has not come."""
        reached, stop = self.start, self.start + self.values.numel()
        for begin, end in sorted(self._filled):
            if begin > reached:
                return reached, begin
            reached = max(reached, end)
        return (reached, stop) if reached < stop else None


def _map_paths(path: Path, value: Any, function: Callable[[Path, Tensor], Tensor]) -> Any:
    """As `map_tensors`; the function also gets where in the entry the tensor is."""
    if isinstance(value, dict):
        return {key: _map_paths((*path, str(key)), part, function) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_paths((*path, str(i)), part, function) for i, part in enumerate(value))
    return map_tensors(value, partial(function, path))


def _positions(state_dict: Mapping[str, Any]) -> dict[Any, int]:
    """Positions by the keys of the state, which are those of the groups' parameters: positions, or names."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return {key: position for position, key in enumerate(keys)}
