"""The whole state of an optimizer in the memory of one rank, as the plain torch optimizer would have it.

It travels parameter by parameter, straight from the ranks that own pieces of one to the rank that asked, which puts them into
tensors on the CPU. Nobody else holds more than the piece that it sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..collectives import ControlGroup
from ..plan.dtensors import local_of
from ..plan.params import ManagedParam, ParamState
from ..storage.masters import MASTER_NAMES
from ..storage.segment import Segment
from .entries import OUTER, block_of, is_array, map_leaves, map_tensors
from .tiers import readable

_WHAT = "consolidating optimizer state"  # for messages


@dataclass(frozen=True)
class WholeState:
    """State of whole parameters, by position.

    Attributes:
        torch: what the torch optimizer would have.
        beyond: what else belongs to it: what completes 16-bit parameters, scales of 8-bit moments, step counts for rounding, what outer
            steps keep.
    """

    torch: dict[int, ParamState]
    beyond: dict[int, ParamState]


def gather_state(
    state: Mapping[Tensor, ParamState],
    segments: Sequence[Segment],
    params: Sequence[ManagedParam],
    control: ControlGroup,
    to: int,
    *,
    has_step: bool,
) -> WholeState | None:
    """The state of all parameters on rank `to`, on the CPU (of DTensors, where they are); None elsewhere.
    Collective.

    Args:
        state: of this rank's segments, masters included.
        control: of the ranks that have it; `lone_control()` where this rank has all of it.
        has_step: whether the torch optimizer keeps a step count.
    """
    owned = {segment.owner.position: segment for segment in segments if segment.shard in state}

    def entry_of(position: int) -> _Entry:  # made when it is needed: moments may have to be decoded
        return _Entry.of(state[owned[position].shard], owned[position])

    everyone = control.collect({position: entry_of(position).described for position in owned}, to, _WHAT)
    if everyone is None:
        for position in sorted(owned):
            device = owned[position].owner.param.device  # of which the backend is, wherever the state is kept
            for piece in entry_of(position).pieces:
                control.send(piece.to(device).contiguous(), [to], _WHAT)
        return None
    whole = WholeState({}, {})
    for managed in sorted(params, key=lambda p: p.position):
        parts = [
            (rank, entries[managed.position]) for rank, entries in enumerate(everyone) if managed.position in entries
        ]
        if not parts:
            continue
        arrays: dict[int, Tensor] = {}
        for rank, described in parts:
            pieces = entry_of(managed.position).pieces if rank == control.rank else None
            for number, array in enumerate(described.arrays):
                piece = pieces[number] if pieces is not None else _receive(array, control, rank, managed.param.device)
                if number not in arrays:
                    arrays[number] = array.allocate(managed)
                array.put(piece, arrays[number])
        rebuilt = parts[0][1].rebuild(arrays.__getitem__)
        kept, beyond = _split(rebuilt, has_step=has_step)
        if kept or not beyond:
            whole.torch[managed.position] = kept
        if beyond:
            whole.beyond[managed.position] = beyond
    return whole


def _split(entry: ParamState, *, has_step: bool) -> tuple[ParamState, ParamState]:
    """What torch's optimizer has, and the rest."""
    kept: ParamState = {}
    beyond: ParamState = {}
    for name, value in entry.items():
        is_beyond = name in (*MASTER_NAMES, OUTER) or name in ops.SCALES or (name == "step" and not has_step)
        (beyond if is_beyond else kept)[name] = value
    return kept, beyond


@dataclass(frozen=True)
class _Array:
    """A tensor that travels.

    Attributes:
        shape: of the piece.
        start: where it begins in the flattened parameter (or in its blocks); None for a tensor that is whole as it is.
        block: elements of the parameter for which it has one.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int | None
    block: int

    def allocate(self, managed: ManagedParam) -> Tensor:
        """The whole, to be filled."""
        if self.start is None:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if self.block > 1:
            return torch.empty(-(-managed.numel // self.block), dtype=self.dtype, device="cpu")
        local = torch.empty(managed.numel, dtype=self.dtype, device="cpu").as_strided(managed.shape, managed.stride)
        return managed.layout_like(local.to(managed.param.device)) if managed.flat_layout.is_part else local

    def put(self, piece: Tensor, whole: Tensor) -> None:
        """Copy a piece to where it belongs."""
        if self.start is None:
            whole.copy_(piece)
            return
        local = local_of(whole)
        local.as_strided((local.numel(),), (1,))[self.start : self.start + piece.numel()].copy_(piece)


@dataclass(frozen=True)
class _Described:
    """An entry of state with numbers in place of its arrays."""

    skeleton: ParamState
    arrays: list[_Array]

    def rebuild(self, array: Callable[[int], Tensor]) -> ParamState:
        """The entry with other arrays."""
        entry: ParamState = map_leaves(
            self.skeleton, lambda _, leaf: array(leaf.value) if isinstance(leaf, _Number) else leaf
        )
        return entry


@dataclass(frozen=True)
class _Number:
    """Stands for an array in a described entry."""

    value: int


@dataclass(frozen=True)
class _Entry:
    """State of one segment, ready to be sent."""

    described: _Described
    pieces: list[Tensor]

    @staticmethod
    def of(entry: ParamState, segment: Segment) -> _Entry:
        """Describe a segment's state, its moments as float32 whatever they are stored in."""
        arrays: list[_Array] = []
        pieces: list[Tensor] = []
        skeleton = {
            name: map_tensors(value, partial(_take_out, name, segment, arrays, pieces))
            for name, value in readable(entry).items()
        }
        return _Entry(_Described(skeleton, arrays), pieces)


def _take_out(name: str, segment: Segment, arrays: list[_Array], pieces: list[Tensor], value: Tensor) -> Any:
    cut = is_array(name, value, segment)
    if not cut and value.dim() == 0:
        return value.detach().cpu().clone()
    block = block_of(name)
    start = segment.start // block if cut else None
    piece = segment.owner.flatten(value) if cut and segment.owner.is_whole and block == 1 else value
    arrays.append(_Array(value.dtype, tuple(piece.shape), start, block))
    pieces.append(piece)
    return _Number(len(pieces) - 1)


def _receive(array: _Array, control: ControlGroup, rank: int, device: torch.device) -> Tensor:
    piece = torch.empty(array.shape, dtype=array.dtype, device=device)
    control.receive(piece, rank, _WHAT)
    return piece
