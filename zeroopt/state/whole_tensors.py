"""The state of single parameters put together on every rank, for parameters that leave the buckets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..collectives import ControlGroup
from ..plan.params import ManagedParam, ParamState
from ..storage.segment import Segment
from .entries import Path, is_array, map_leaves
from .sent import Sent
from .tiers import decoded


@dataclass(frozen=True)
class _Piece:
    """Elements of an array of state, 1-D."""

    values: Tensor


# The first of the parameter's elements in a segment, and the segment's state.
_Part = tuple[int, ParamState]


def whole_states(
    state: Mapping[Tensor, ParamState],
    segments: Iterable[Segment],
    params: Sequence[ManagedParam],
    control: ControlGroup,
) -> dict[ManagedParam, ParamState]:
    """The state of whole parameters, where they have any, 8-bit moments decoded. Collective.

    Args:
        state: by segment's shard, with what completes 16-bit parameters.
        segments: of these parameters, on this rank.
        control: of the ranks that have it; `lone_control()` where this rank has all of it.
    """
    mine: dict[int, _Part] = {
        s.owner.index: (s.start, map_leaves(decoded(state[s.shard]), partial(_take_out, s)))
        for s in segments
        if s.shard in state
    }
    everyone = control.objects(mine, "gathering the state of parameters that leave their groups")
    whole = {}
    for managed in params:
        by_start = dict(one[managed.index] for one in everyone if managed.index in one)  # of replicas, any one's
        if by_start:
            whole[managed] = _join(managed, sorted(by_start.items()))
    return whole


def _take_out(segment: Segment, path: Path, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not is_array(str(path[0]), value, segment):
        return Sent.of(value)
    flat = segment.owner.flatten(value) if segment.owner.is_whole else value
    return _Piece(flat.detach().reshape(-1).to("cpu", copy=True))  # a view would be pickled with its whole storage


def _join(managed: ManagedParam, parts: Sequence[_Part]) -> ParamState:
    leaves: list[dict[Path, Any]] = []
    for _, entry in parts:
        leaves.append({})
        map_leaves(entry, leaves[-1].__setitem__)

    def join(path: Path, leaf: Any) -> Any:
        if isinstance(leaf, Sent):
            return leaf.at(managed.param.device)
        if not isinstance(leaf, _Piece):
            return leaf
        flat = torch.cat([one[path].values for one in leaves]).to(managed.param.device)
        return managed.layout_like(flat.as_strided(managed.shape, managed.stride))

    joined: ParamState = map_leaves(parts[0][1], join)
    return joined
