"""Parameters that an optimizer steps part by part, each part as a parameter of its own: fused q, k and v, or heads.

State stays that of the whole parameter, as state dicts and checkpoints have it: for the time of a step each part has its piece of
it. What has an element for each of the parameter's is cut as the parameter is, and the pieces are views: nothing is copied. Of
anything else (a factor of rows or columns) the pieces of all parts lie side by side; numbers, as step counts, are alike for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..plan.params import ManagedParam, ParamState
from ..storage.segment import Segment

Leaves = Mapping[Segment, Sequence[nn.Parameter]]
"""What an optimizer steps of each segment: its shard, or the parts of that."""


@contextmanager
def in_parts(optimizer: torch.optim.Optimizer, segments: Sequence[Segment]) -> Iterator[Leaves]:
    """Within it, the optimizer has the state of the parts in place of that of the parameters that consist of some."""
    parts = [_Parts(optimizer, segment) for segment in segments if segment.owner.is_stepped_in_parts]
    leaves: dict[Segment, Sequence[nn.Parameter]] = {segment: (segment.shard,) for segment in segments}
    leaves.update((one.segment, one.leaves) for one in parts)
    try:
        yield leaves
    finally:
        for one in parts:
            one.join()


def parts_of(owner: ManagedParam, values: Tensor) -> list[Tensor]:
    """The parts of a tensor of a parameter's shape, views."""
    return list(torch.split(values, owner.part_sizes, owner.part_dim))


class _Parts:
    """The parts of one segment."""

    def __init__(self, optimizer: torch.optim.Optimizer, segment: Segment) -> None:
        self.segment = segment
        self._owner = segment.owner
        self._state = optimizer.state
        self.leaves = [nn.Parameter(part) for part in parts_of(self._owner, segment.shard.data)]
        self._whole: dict[int, tuple[Tensor, list[Any]]] = {}  # by the address of a first piece, whose pieces they are
        entry = self._state.pop(segment.shard, None)
        if entry is not None:
            cut = tree_map(self._cut, entry, is_leaf=lambda value: isinstance(value, Tensor))
            leaves, structure = tree_flatten(cut, is_leaf=lambda value: isinstance(value, _Pieces))
            for number, leaf in enumerate(self.leaves):
                self._state[leaf] = tree_unflatten([pieces[number] for pieces in leaves], structure)

    def _cut(self, value: Any) -> _Pieces:
        count = len(self.leaves)
        if not isinstance(value, Tensor):
            return _Pieces([value] * count)
        if value.dim() == 0:
            return _Pieces([value.clone() for _ in range(count)])
        dim = min(self._owner.part_dim, value.dim() - 1)
        length = value.shape[dim]
        if length == sum(self._owner.part_sizes):
            pieces = _Pieces(torch.split(value, self._owner.part_sizes, dim))
        elif length % count == 0:
            pieces = _Pieces(value.chunk(count, dim))
        else:  # of a run that stepped it whole
            return _Pieces([value.clone() for _ in range(count)])
        self._whole[id(pieces[0])] = value, pieces
        return pieces

    def join(self) -> None:
        """Let the state be the whole parameter's again."""
        entries: list[ParamState] = [self._state.pop(leaf, {}) for leaf in self.leaves]
        if not all(entries):
            return  # a parameter without a gradient has been left alone
        flat = [tree_flatten(entry) for entry in entries]
        structure = flat[0][1]
        self._state[self.segment.shard] = tree_unflatten(
            [self._joined(values) for values in zip(*(leaves for leaves, _ in flat), strict=True)], structure
        )

    def _joined(self, values: Sequence[Any]) -> Any:
        first = values[0]
        if not isinstance(first, Tensor) or first.dim() == 0:
            return first
        whole, pieces = self._whole.get(id(first), (None, []))
        if whole is not None and all(one is other for one, other in zip(values, pieces, strict=True)):
            return whole
        joined = torch.cat(list(values), min(self._owner.part_dim, first.dim() - 1))
        shape, stride = self._owner.shape, self._owner.stride
        if joined.shape != shape or joined.stride() == stride:
            return joined
        return torch.empty_strided(shape, stride, dtype=joined.dtype, device=joined.device).copy_(joined)


class _Pieces(list[Any]):
    """Those of one value, for each part; a leaf of its own."""
