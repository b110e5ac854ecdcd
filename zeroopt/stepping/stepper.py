"""One optimizer step on this rank's segments: by a fused kernel where there is one, else by the optimizer's own step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError, StateError
from ..options.config import Config
from ..options.precision import Precision
from ..own_storage import with_own_storage
from ..plan.params import ManagedParam
from ..probing.probe import step_without_hooks
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore
from ..storage.segment import Segment
from .rules import FusedRule, fused_optimizers, rule_for
from .segments import FusedSegments, StateArray


class ShardStepper:
    """Steps the own range of every bucket.

    The state lives in the wrapped optimizer's `state`, keyed by the segments' shards, whichever way a bucket is stepped.

    Attributes:
        seed: of stochastic rounding, the same on all ranks.
        refusal: the hook that lets nobody step the wrapped optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        seed: int,
        config: Config,
    ) -> None:
        self.seed = seed
        self._optimizer = optimizer
        self._precision = config.precision
        self._may_fuse = bool(config.fused)
        self._fused: list[FusedBucket] = []
        self.refusal = optimizer.register_step_pre_hook(self._refuse_direct_step)
        self.adopt((), ())

    def adopt(self, buckets: Sequence[Bucket], stores: Sequence[GradientStore]) -> None:
        """Take up the optimizer's groups and buckets as they are now, and its state for their segments."""
        self._rule = rule_for(self._optimizer) if self._may_fuse else None
        self._plain: list[tuple[Bucket, GradientStore]] = []
        self._fused_parts: list[tuple[Bucket, GradientStore, ops.Storage]] = []
        for bucket, store in zip(buckets, stores, strict=True):
            storage = self._precision.storage(bucket.dtype, store.reduced.dtype)
            if self._rule is not None and storage is not None:
                self._fused_parts.append((bucket, store, storage))
            else:
                self._plain.append((bucket, store))
        self.adopt_state()

    def adopt_state(self) -> None:
        """Take up the optimizer's state after it was replaced from outside."""
        self._fused.clear()

    def step(self, active: Tensor) -> Iterator[Bucket]:
        """Step the active parameters, and yield each bucket when its own range is up to date.

        The buckets that the next forward needs first come first.

        Args:
            active: uint8 [number of parameters], 1 where the parameter has a gradient.
        """
        if self._rule is not None and self._fused_parts:
            yield from self._step_fused(self._rule, active)
        if self._plain:
            with named_range("step", f"{len(self._plain)} buckets by {type(self._optimizer).__name__}"):
                self._step_plain(active)
            yield from (bucket for bucket, _ in reversed(self._plain))

    def _step_fused(self, rule: FusedRule, active: Tensor) -> Iterator[Bucket]:
        if not self._fused:
            self._fused = [FusedBucket(*parts, rule, self._optimizer) for parts in self._fused_parts]
        groups = torch.tensor([rule.hyper_row(g) for g in self._optimizer.param_groups], dtype=torch.float64)
        control = ops.StepControl(seed=self.seed)
        flags = active.tolist()
        for fused in reversed(self._fused):
            with named_range("step", fused.bucket.name):
                fused.step_params(flags, groups, control)
            yield fused.bucket

    def apply(self, method: Callable[[torch.optim.Optimizer], object]) -> None:
        """Call a method of the optimizer that writes parameters, with this rank's segments in their place."""
        parts = [*self._plain, *((bucket, store) for bucket, store, _ in self._fused_parts)]
        by_group: list[list[torch.nn.Parameter]] = [[] for _ in self._optimizer.param_groups]
        for bucket, _ in parts:
            for segment in bucket.segments:
                by_group[segment.owner.group].append(segment.shard)
        with self._shards_in_groups(by_group):
            method(self._optimizer)
        for bucket, _ in parts:
            bucket.master.round_stepped()

    def _step_plain(self, active: Tensor) -> None:
        flags = active.tolist()
        by_group: list[list[torch.nn.Parameter]] = [[] for _ in self._optimizer.param_groups]
        segments = []
        for bucket, store in self._plain:
            for segment in bucket.segments:
                by_group[segment.owner.group].append(segment.shard)
                segments.append(segment)
                if flags[segment.owner.index]:
                    segment.shard.grad = store.part_as(segment, segment.shard.dtype)
        with self._shards_in_groups(by_group):
            step_without_hooks(self._optimizer)
        for segment in segments:
            segment.shard.grad = None
        for bucket, _ in self._plain:
            bucket.master.round_stepped()

    @contextmanager
    def _shards_in_groups(self, by_group: Sequence[list[torch.nn.Parameter]]) -> Iterator[None]:
        """The groups keep being the user's dict objects, so the shards take the parameters' place in them for a moment."""
        groups = self._optimizer.param_groups
        whole = [group["params"] for group in groups]
        for group, shards in zip(groups, by_group, strict=True):
            group["params"] = shards
        try:
            yield
        finally:
            for group, params in zip(groups, whole, strict=True):
                group["params"] = params

    def _refuse_direct_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer is self._optimizer:
            name = type(optimizer).__name__
            raise StateError(
                f"this {name} was wrapped by zeroopt.wrap and no longer sees the gradients; "
                "call step() on the optimizer that zeroopt.wrap returned"
            )


class FusedBucket(FusedSegments):
    """The segments of one bucket; their state lies side by side, in one flat array of the own range for each name."""

    def __init__(
        self,
        bucket: Bucket,
        store: GradientStore,
        storage: ops.Storage,
        rule: FusedRule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.bucket = bucket
        self._store = store
        self._flat: dict[str, StateArray] = {}
        leaves = [s.shard for s in bucket.segments]
        group_of = [s.owner.group for s in bucket.segments]
        super().__init__(optimizer, rule, storage, leaves, group_of, bucket.device)

    def step_params(self, flags: Sequence[int], groups: Tensor, control: ops.StepControl) -> None:
        """One step; flags are 1 for the active ones of all parameters of the model."""
        if self._store.factor is not None:
            control = replace(control, clip_coef=self._store.factor.float())
        active = torch.tensor([flags[segment.owner.index] for segment in self.bucket.segments], dtype=torch.uint8)
        self.step(active, groups, control)

    def _arrays(self, i: int) -> ops.SegmentArrays:
        segment, master = self.bucket.segments[i], self.bucket.master.array
        return ops.SegmentArrays(
            param=_part(self.bucket.own_param, segment),
            grad=_part(self._store.reduced, segment),
            master=None if master is None else _part(master, segment),
            group=segment.owner.group,
            key=segment.owner.position,
            first=segment.start,
        )

    def _show(self, i: int, array: Tensor) -> Tensor:
        owner = self.bucket.segments[i].owner
        return with_own_storage(array.as_strided(owner.shape, owner.stride) if owner.is_whole else array)

    def _flatten(self, i: int, value: Tensor) -> Tensor:
        owner = self.bucket.segments[i].owner
        return owner.flatten(value) if owner.is_whole else value

    def _state(self, i: int, name: str) -> StateArray | None:
        if name not in self._flat:
            return None
        array, scales = self._flat[name]
        segment = self.bucket.segments[i]
        first = segment.offset // ops.QUANT_BLOCK
        part = None if scales is None else scales[first : first + ops.num_blocks(segment.numel)]
        return _part(array, segment), part

    def _make_state(self, i: int, name: str, dtype: torch.dtype) -> StateArray:
        array = torch.zeros_like(self.bucket.own_param, dtype=dtype)
        scales = (
            torch.zeros(ops.num_blocks(array.numel()), dtype=torch.float32, device=array.device)
            if self._storage.has_scales
            else None
        )
        self._flat[name] = array, scales
        made = self._state(i, name)
        assert made is not None
        return made


def _part(array: Tensor, segment: Segment) -> Tensor:
    return array[segment.offset : segment.offset + segment.numel]


def check_fused(optimizer: torch.optim.Optimizer, params: Sequence[ManagedParam], config: Config) -> None:
    """Raise ConfigError when the options ask for a kernel that does not exist for this optimizer and these dtypes."""
    wanted = _what_needs_a_kernel(config)
    if wanted is None:
        return
    if config.fused is False:
        raise ConfigError(f"{wanted} needs a fused kernel, and fused=False forbids it")
    if rule_for(optimizer) is None:
        raise ConfigError(
            f"{wanted}: there is no fused kernel for {type(optimizer).__name__} with these options, only for "
            f"{', '.join(fused_optimizers())} and the optimizers of zeroopt.optim; leave that option out to take the "
            "optimizer's own step instead"
        )
    for managed in params:
        dtype = config.precision.stored_dtype(managed.param.dtype)
        if config.precision.storage(dtype, dtype) is None:
            raise ConfigError(
                f"{wanted}: parameter {managed.name!r} is {managed.param.dtype}, for which there is no fused kernel; it "
                "needs float32 parameters, or param_dtype=torch.bfloat16 or torch.float16"
            )


def _what_needs_a_kernel(config: Config) -> str | None:
    precision: Precision = config.precision
    if config.fused is True:
        return "fused=True"
    if precision.state_dtype is not torch.float32:
        return f"state_dtype={precision.state_dtype}"
    if precision.master_weights != "float32":
        return f"master_weights={precision.master_weights!r}"
    return None
