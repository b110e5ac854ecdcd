"""One step of one bucket, or of several, by a fused kernel."""

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
    """The segments of some buckets that are stepped in one call; their state lies side by side, in one flat array of a bucket's own
    range for each name.

    Attributes:
        buckets: in their order.
    """

    def __init__(
        self, shards: Sequence[OwnShard], storage: ops.Storage, rule: FusedRule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.buckets = [shard.bucket for shard in shards]
        self._shards = shards
        self._segments = [(shard, segment) for shard in shards for segment in shard.bucket.segments]
        self._flat: dict[tuple[OwnShard, str], StateArray] = {}
        leaves = [segment.shard for _, segment in self._segments]
        group_of = [segment.owner.group for _, segment in self._segments]
        super().__init__(optimizer, rule, storage, leaves, group_of, shards[0].device)

    def step_params(self, flags: Sequence[int], groups: Tensor, control: ops.StepControl) -> None:
        """One step; flags are 1 for the active ones of all parameters of the model."""
        for shard in self._shards:
            shard.fetch()
        for factor, shards in self._by_factor():
            active = [flags[segment.owner.index] if shard in shards else 0 for shard, segment in self._segments]
            clip_coef = None if factor is None else factor.to(self._device, torch.float32)
            self.step(
                torch.tensor(active, dtype=torch.uint8, device="cpu"), groups, replace(control, clip_coef=clip_coef)
            )
        for shard in self._shards:
            shard.publish()

    def _by_factor(self) -> list[tuple[Tensor | None, set[OwnShard]]]:
        """The shards whose sums have yet to be multiplied by the same tensor, or by nothing: all of them, mostly."""
        together: dict[int, tuple[Tensor | None, set[OwnShard]]] = {}
        for shard in self._shards:
            together.setdefault(id(shard.factor), (shard.factor, set()))[1].add(shard)
        return list(together.values())

    def _arrays(self, i: int) -> ops.SegmentArrays:
        shard, segment = self._segments[i]
        param, master = shard.master.kernel_arrays
        return ops.SegmentArrays(
            param=segment.part_of(param),
            grad=segment.part_of(shard.grad),
            master=None if master is None else segment.part_of(master),
            group=segment.owner.group,
            key=segment.owner.position,
            first=segment.start,
        )

    def _show(self, i: int, array: Tensor) -> Tensor:
        owner = self._segments[i][1].owner
        return with_own_storage(array.as_strided(owner.shape, owner.stride) if owner.is_whole else array)

    def _flatten(self, i: int, value: Tensor) -> Tensor:
        return self._segments[i][1].flatten(value)

    def _state(self, i: int, name: str) -> StateArray | None:
        shard, segment = self._segments[i]
        if (shard, name) not in self._flat:
            return None
        array, scales = self._flat[shard, name]
        first = segment.offset // ops.QUANT_BLOCK
        part = None if scales is None else scales[first : first + ops.num_blocks(segment.numel)]
        return segment.part_of(array), part

    def _make_state(self, i: int, name: str, dtype: torch.dtype) -> StateArray:
        shard = self._segments[i][0]
        array = paged_zeros_like(shard.master.param, dtype)
        scales = (
            paged_zeros(ops.num_blocks(array.numel()), torch.float32, array.device)
            if self._storage.has_scales
            else None
        )
        self._flat[shard, name] = array, scales
        made = self._state(i, name)
        assert made is not None
        return made
