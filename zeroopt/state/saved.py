"""From saved state to the state of this rank's segments, whoever saved it: a plain torch optimizer, or any ranks of any run.

State dicts are taken one after the other, and of each only what this rank needs is copied, so one that is read when it is
asked for takes no more memory than that. Nothing of the optimizer changes here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError
from ..pages import paged_zeros
from ..plan.dtensors import is_distributed
from ..plan.params import ManagedParam, ParamState
from ..probing.probe import is_per_element
from ..stepping.part_state import problem_with_parts
from ..stepping.step_counts import check_count
from ..storage.masters import MASTER_NAMES
from ..storage.segment import Segment
from .entries import OUTER, Path, block_of, map_leaves, map_tensors
from .layout import ShardLayout
from .shard_tensor import ShardTensor
from .tiers import decoded

_ADVICE = (
    "give load_state_dict what state_dict() gave on every rank of that run, as in "
    "optimizer.load_state_dict([torch.load(f'optimizer-{rank}.pt', mmap=True) for rank in range(world_size)]). Where one rank saves "
    "for all, call optimizer.consolidate_state_dict() on every rank before that rank calls state_dict()"
)


class SavedState:
    """Collects the state of some segments from state dicts.

    Args:
        segments: those of this rank.
        params: all that the optimizer trains.
        idle: parameters by position that no rank steps, whose state all ranks keep.
        part: which part of the parameters the rank holds; see `plan.dtensors.place_in_mesh`.
        live: state that there is now, whose dtypes are kept.
        keeps_codes: whether moments stay in 8 bits that come so.
        keeps: whether tensors that are just what a segment needs become its state as they are, uncopied: they are nobody else's.
    """

    def __init__(
        self,
        segments: Iterable[Segment],
        params: Sequence[ManagedParam],
        idle: Mapping[int, Tensor],
        part: str,
        live: Mapping[Tensor, Mapping[str, Any]],
        *,
        keeps_codes: bool,
        keeps: bool = False,
    ) -> None:
        self._keeps_codes = keeps_codes
        self._ranges: dict[int, set[tuple[int, int]]] = {}  # that shards are of
        self._took_whole = False
        self._idle = idle
        self._idle_state: dict[Tensor, ParamState] = {}
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
        self._took_whole |= layout is None or not layout.is_shard
        if layout is not None:
            self._check_shapes(layout)
            for position, shape in layout.shapes.items():
                found = self._ranges.setdefault(position, {(math.prod(shape),) * 2})  # ends with an empty one
                found.update({layout.ranges[position]} if position in layout.ranges else ())
        positions = _positions(state_dict)
        entries = {positions.get(key, key): entry for key, entry in state_dict["state"].items()}
        beyond = {} if layout is None else layout.beyond_torch
        self._check_counts(entries)
        self._check_counts(beyond)
        if layout is None:
            for position, owner in self._params.items():  # those of other ranks too, so that all refuse the same
                map_leaves(entries.get(position, {}), partial(_check_shape, owner))
        for position, segment in self._segments.items():
            parts = [part[position] for part in (entries, beyond) if position in part]
            entry = {name: value for part in parts for name, value in part.items()}
            if layout is not None and layout.is_shard and parts and position not in layout.ranges:
                self._absent.add(position)
                continue
            self._known.add(position)
            if entry:  # segments begin within blocks where there are no codes
                self._take_entry(segment, entry if self._keeps_codes else decoded(entry), layout)
        for position, param in self._idle.items():
            if entries.get(position):
                entry = entries[position]
                self._idle_state[param] = {n: map_tensors(v, partial(_like_torch, n, param)) for n, v in entry.items()}

    def finish(self, *, of_all_ranks: bool = False) -> dict[Tensor, ParamState]:
        """The state of each segment that has any, by its shard, and of idle parameters.

        Args:
            of_all_ranks: the shards have to be those of all ranks of a run, whether this rank needs them or not.

        Raises:
            StateError: elements of this rank were in none of the state dicts.
        """
        if of_all_ranks and not self._took_whole:
            self._check_ranges()
        for position in self._absent - self._known:
            owner = self._segments[position].owner
            raise StateError(
                f"the state dict holds nothing of parameter {owner.name!r}, of which another rank had a part; {_ADVICE}"
            )
        for (position, path), array in self._arrays.items():
            self._check_complete(self._segments[position], path, array)
        own: dict[Tensor, ParamState] = {self._segments[p].shard: entry for p, entry in self._state.items()}
        return own | self._idle_state

    def _check_ranges(self) -> None:
        for position, ranges in self._ranges.items():
            ordered = sorted(ranges)
            ends = [0, *(stop for _, stop in ordered[:-1])]
            if [start for start, _ in ordered] != ends and position in self._params:
                raise StateError(
                    f"the state dicts hold elements {_shown(ordered)} of parameter {self._params[position].name!r} of "
                    f"{ordered[-1][0]}: they are not those of all ranks of one run; {_ADVICE}"
                )

    def _check_counts(self, entries: Mapping[Any, Mapping[str, Any]]) -> None:
        """Those of other ranks' parameters too, so that all refuse the same."""
        for position in self._params.keys() | self._idle.keys():
            name = self._params[position].name if position in self._params else str(position)
            check_count(name, entries.get(position, {}), "the state dict")

    def _check_shapes(self, layout: ShardLayout) -> None:
        for position, shape in layout.shapes.items():
            managed = self._params.get(position)
            if managed is not None and shape != list(managed.shape):
                raise StateError(
                    f"the state dict has shape {shape} for parameter {managed.name!r} of shape {list(managed.shape)}"
                )

    def _take_entry(self, segment: Segment, entry: Mapping[str, Any], layout: ShardLayout | None) -> None:
        own = {name: value for name, value in entry.items() if name not in MASTER_NAMES and name != OUTER}
        problem = problem_with_parts(segment.owner, own)
        if problem is not None:
            raise StateError(
                f"the state dict has, of parameter {segment.owner.name!r}, {problem}: load it with the matrix_splits with which it "
                "was saved"
            )
        result = self._state.setdefault(segment.owner.position, {})
        for name, value in entry.items():
            result[name] = map_leaves(value, partial(self._take_value, segment, layout), (name,))

    def _take_value(self, segment: Segment, layout: ShardLayout | None, path: Path, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        owner, name = segment.owner, str(path[-1])
        if owner.is_whole and name not in MASTER_NAMES:
            return (
                value.clone() if name == "step" or value.dim() == 0 else self._converted(segment, layout, path, value)
            )
        piece = self._find_piece(owner, name, value, layout)
        if piece is None:  # a step count stays where torch keeps it, on the CPU
            return value.to(segment.shard.device if value.dim() else value.device, copy=True)
        block = block_of(name)
        key = (owner.position, path)
        if key not in self._arrays:
            numel, start = -(-segment.numel // block), segment.start // block
            dtype, device = self._dtype(segment, path, value.dtype, layout), segment.shard.device
            if self._keeps and _is_just(piece, start, numel, dtype, device):
                self._arrays[key] = _Array(piece[1], start)
            else:
                self._arrays[key] = _Array(paged_zeros(numel, dtype, device), start)
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
        return None

    def _check_part(self, owner: ManagedParam, value: Tensor, layout: ShardLayout | None) -> None:
        """Local tensors of a DTensor do not say which part they are."""
        if layout is not None and owner.flat_layout.is_part and not is_distributed(value) and layout.part != self._part:
            raise StateError(
                f"the state dict was saved with part={layout.part}, this optimizer has part={self._part}: a shard has local "
                "tensors of its rank; zeroopt.checkpoint loads into any mesh"
            )

    def _converted(self, segment: Segment, layout: ShardLayout | None, path: Path, value: Tensor) -> Tensor:
        dtype = self._dtype(segment, path, value.dtype, layout)
        return value.to(segment.shard.device, dtype, copy=not self._keeps)

    def _dtype(self, segment: Segment, path: Path, dtype: torch.dtype, layout: ShardLayout | None) -> torch.dtype:
        """As torch does, floating-point state takes the dtype that belongs to the parameter, but not where it is known to have
        another one: in state that is there, or in the run that saved it with parameters like these."""
        name = str(path[-1])
        if not dtype.is_floating_point or name in MASTER_NAMES or block_of(name) > 1:
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
            owner, block = segment.owner, block_of(str(path[-1]))
            end = min(gap[1] * block, owner.numel)
            raise StateError(
                f"the state dict lacks elements {gap[0] * block} to {end} of {'.'.join(map(str, path))!r} of parameter {owner.name!r}, of "
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


def _check_shape(owner: ManagedParam, path: Path, value: Any) -> None:
    if not isinstance(value, Tensor) or isinstance(value, ShardTensor) or owner.is_whole:
        return
    local, name = owner.local_part(value), str(path[-1])
    blocks = -(-owner.numel // block_of(name))
    fits = list(local.shape) == [blocks] if block_of(name) > 1 else is_per_element(name, local, owner.local)
    # torch 2.0 has step counts of shape [1]
    if local.dim() > 0 and not fits and not (name == "step" and local.shape == (1,)):
        raise StateError(
            f"the state dict has {name!r} of shape {list(value.shape)} for parameter {owner.name!r} of shape "
            f"{list(owner.param.shape)}"
        )


def _shown(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{start} to {stop}" for start, stop in ranges if start < stop) or "none"


def _is_just(piece: tuple[int, Tensor], start: int, numel: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a piece has those elements, no others, as they are to be kept."""
    first, elements = piece
    fits = (first, elements.numel(), elements.dtype, elements.device) == (start, numel, dtype, device)
    return fits and elements.is_contiguous()


def _like_torch(name: str, param: Tensor, value: Tensor) -> Tensor:
    """A copy of a parameter's state, of the dtype and on the device where torch's optimizers load it."""
    if name == "step":
        return value.clone()
    dtype = param.dtype if value.is_floating_point() and param.is_floating_point() else value.dtype
    return value.to(param.device, dtype, copy=True)


def positions_of(state_dict: Mapping[str, Any]) -> set[int]:
    """Of the parameters that a state dict has state of."""
    positions = _positions(state_dict)
    return {positions.get(key, key) for key in state_dict["state"]}


def _positions(state_dict: Mapping[str, Any]) -> dict[Any, int]:
    """Positions by the keys of the state, which are those of the groups' parameters: positions, or names."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return {key: position for position, key in enumerate(keys)}
