"""One step of one bucket by a fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from ..own_storage import with_own_storage
from ..pages import paged_zeros, paged_zeros_like
from ..storage.own_shard import OwnShard
from .rules import FusedRule
from .segments import FusedSegments, StateArray


class BucketKernel(FusedSegments):
    """The segments of one bucket; their state lies side by side, in one flat array of the own range for each name."""

    def __init__(
        self, shard: OwnShard, storage: ops.Storage, rule: FusedRule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.bucket = shard.bucket
        self._shard = shard
        self._segments = shard.bucket.segments
        self._flat: dict[str, StateArray] = {}
        leaves = [segment.shard for segment in self._segments]
        group_of = [segment.owner.group for segment in self._segments]
        super().__init__(optimizer, rule, storage, leaves, group_of, shard.device)

    def step_params(self, flags: Sequence[int], groups: Tensor, control: ops.StepControl) -> None:
        """One step; flags are 1 for the active ones of all parameters of the model."""
        factor = self._shard.factor
        if factor is not None:
            control = replace(control, clip_coef=factor)
        active = torch.tensor([flags[segment.owner.index] for segment in self._segments], dtype=torch.uint8)
        self._shard.fetch()
        self.step(active, groups, control)
        self._shard.publish()

    def _arrays(self, i: int) -> ops.SegmentArrays:
        segment, master = self._segments[i], self._shard.master
        return ops.SegmentArrays(
            param=segment.part_of(master.param),
            grad=segment.part_of(self._shard.grad),
            master=None if master.array is None else segment.part_of(master.array),
            group=segment.owner.group,
            key=segment.owner.position,
            first=segment.start,
        )

    def _show(self, i: int, array: Tensor) -> Tensor:
        owner = self._segments[i].owner
        return with_own_storage(array.as_strided(owner.shape, owner.stride) if owner.is_whole else array)

    def _flatten(self, i: int, value: Tensor) -> Tensor:
        return self._segments[i].flatten(value)

    def _state(self, i: int, name: str) -> StateArray | None:
        if name not in self._flat:
            return None
        array, scales = self._flat[name]
        segment = self._segments[i]
        first = segment.offset // ops.QUANT_BLOCK
        part = None if scales is None else scales[first : first + ops.num_blocks(segment.numel)]
        return segment.part_of(array), part

    def _make_state(self, i: int, name: str, dtype: torch.dtype) -> StateArray:
        array = paged_zeros_like(self._shard.master.param, dtype)
        scales = (
            paged_zeros(ops.num_blocks(array.numel()), torch.float32, array.device)
            if self._storage.has_scales
            else None
        )
        self._flat[name] = array, scales
        made = self._state(i, name)
        assert made is not None
        return made
