"""One optimizer step on this rank's segments: by a fused kernel where there is one, else by the optimizer's own step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import ops
from .bucket import Bucket, ManagedParam, Segment
from .config import Fused
from .errors import ConfigError, StateError
from .fused_rules import FUSED_DTYPES, FusedRule, fused_optimizers, rule_for
from .gradient_store import GradientStore
from .shard_state import ParamState


class ShardStepper:
    """Steps the own range of every bucket.

    The state lives in the wrapped optimizer's `state`, keyed by the segments' shards, whichever way a bucket is stepped.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buckets: Sequence[Bucket],
        stores: Sequence[GradientStore],
        fused: Fused,
    ) -> None:
        self._optimizer = optimizer
        self._rule = rule_for(optimizer) if fused else None
        self._fused: list[FusedBucket] = []
        self._stepping = False
        optimizer.register_step_pre_hook(self._refuse_direct_step)
        self.adopt(buckets, stores)

    def adopt(self, buckets: Sequence[Bucket], stores: Sequence[GradientStore]) -> None:
        """Take up buckets in which the same parameters lie, and the optimizer's state for their segments."""
        has_kernel = {b.index: self._rule is not None and b.dtype in FUSED_DTYPES for b in buckets}
        pairs = list(zip(buckets, stores, strict=True))
        self._plain = [(b, s) for b, s in pairs if not has_kernel[b.index]]
        self._fused_pairs = [(b, s) for b, s in pairs if has_kernel[b.index]]
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
        if self._rule is not None and self._fused_pairs:
            yield from self._step_fused(self._rule, active)
        if self._plain:
            self._step_plain(active)
            yield from (bucket for bucket, _ in reversed(self._plain))

    def _step_fused(self, rule: FusedRule, active: Tensor) -> Iterator[Bucket]:
        if not self._fused:
            self._fused = [FusedBucket(b, s, rule, self._optimizer) for b, s in self._fused_pairs]
        groups = torch.tensor([rule.hyper_row(g) for g in self._optimizer.param_groups], dtype=torch.float64)
        for fused in reversed(self._fused):
            fused.step(active, groups)
            yield fused.bucket

    def _step_plain(self, active: Tensor) -> None:
        flags = active.tolist()
        by_group: list[list[torch.nn.Parameter]] = [[] for _ in self._optimizer.param_groups]
        segments = []
        for bucket, store in self._plain:
            for segment in bucket.segments:
                by_group[segment.owner.group].append(segment.shard)
                segments.append(segment)
                if flags[segment.owner.index]:
                    segment.shard.grad = store.reduced[segment.offset : segment.offset + segment.numel]
        with self._shards_in_groups(by_group):
            self._optimizer.step()
        for segment in segments:
            segment.shard.grad = None

    @contextmanager
    def _shards_in_groups(self, by_group: Sequence[list[torch.nn.Parameter]]) -> Iterator[None]:
        """The groups keep being the user's dict objects, so the shards take the parameters' place in them for a moment."""
        groups = self._optimizer.param_groups
        whole = [group["params"] for group in groups]
        for group, shards in zip(groups, by_group, strict=True):
            group["params"] = shards
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            for group, params in zip(groups, whole, strict=True):
                group["params"] = params

    def _refuse_direct_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._stepping:
            name = type(optimizer).__name__
            raise StateError(
                f"this {name} was wrapped by zeroopt.wrap and no longer sees the gradients; "
                "call step() on the optimizer that zeroopt.wrap returned"
            )


class FusedBucket:
    """State of one bucket's own range in the flat form that a fused kernel takes."""

    def __init__(self, bucket: Bucket, store: GradientStore, rule: FusedRule, optimizer: torch.optim.Optimizer) -> None:
        self.bucket = bucket
        self._store = store
        self._rule = rule
        self._optimizer = optimizer
        rows = torch.tensor([[s.offset, s.numel, s.owner.group] for s in bucket.segments], dtype=torch.int64)
        self._segments = ops.SegmentTable.check(rows.view(-1, 3).to(bucket.device))
        self._owners = torch.tensor([s.owner.index for s in bucket.segments], dtype=torch.int64)
        self._steps = torch.zeros(len(bucket.segments), device=bucket.device)
        self._state: dict[str, Tensor] = {}
        self._names: list[tuple[str, ...] | None] = [None] * len(bucket.segments)
        self._begun = [False] * len(bucket.segments)  # whether a segment ever had state
        for i, segment in enumerate(bucket.segments):
            if segment.shard in optimizer.state:
                self._adopt(i, segment, optimizer.state[segment.shard])

    def step(self, active: Tensor, groups: Tensor) -> None:
        """One step of the segments whose parameters are active."""
        mask = active.index_select(0, self._owners)
        in_use = [self._rule.names_in_use(group) for group in self._optimizer.param_groups]
        for i, flag in enumerate(mask.tolist()):
            names = in_use[self.bucket.segments[i].owner.group]
            if flag and names != self._names[i]:
                self._expose(i, names)
        if not mask.any():  # nothing to step, and perhaps no state yet to step it with
            return
        self._rule.launch(
            self.bucket.own_param,
            self._store.reduced,
            self._state,
            segments=self._segments,
            active=mask.to(self.bucket.device),
            steps=self._steps,
            groups=groups.to(self.bucket.device),
        )

    def _expose(self, i: int, names: tuple[str, ...]) -> None:
        """Show a segment's state in the optimizer's `state`, as views, once the segment has any."""
        self._names[i] = names
        if names and not self._begun[i] and not self._rule.has_step:
            self._steps[i] = 0  # SGD's state begins when momentum is turned on, not at its first step
        self._begun[i] |= bool(names)
        segment = self.bucket.segments[i]
        entry: ParamState = {name: self._view(name, segment) for name in names}
        if self._rule.has_step:
            entry = {"step": self._steps[i], **entry}
        if entry:
            self._optimizer.state[segment.shard] = entry

    def _adopt(self, i: int, segment: Segment, entry: ParamState) -> None:
        """Take over state that came from a load or from before wrapping."""
        names = tuple(name for name in self._rule.state_names if isinstance(entry.get(name), Tensor))
        for name in names:
            self._view(name, segment).copy_(entry[name])
        self._expose(i, names)
        self._steps[i] = float(entry["step"]) if self._rule.has_step else float(bool(names))

    def _view(self, name: str, segment: Segment) -> Tensor:
        if name not in self._state:
            self._state[name] = torch.zeros_like(self.bucket.own_param)
        return self._state[name][segment.offset : segment.offset + segment.numel]


def check_fused(optimizer: torch.optim.Optimizer, params: Sequence[ManagedParam], fused: Fused) -> None:
    """Raise ConfigError when `fused=True` asks for a kernel that does not exist for this optimizer and these dtypes."""
    if fused is not True:
        return
    if rule_for(optimizer) is None:
        raise ConfigError(
            f"fused=True: there is no fused kernel for {type(optimizer).__name__} with these options, only for "
            f"{', '.join(fused_optimizers())}; use fused='auto' to take the optimizer's own step instead"
        )
    for managed in params:
        if managed.param.dtype not in FUSED_DTYPES:
            raise ConfigError(
                f"fused=True: parameter {managed.name!r} is {managed.param.dtype}, the fused kernels take "
                f"{', '.join(map(str, FUSED_DTYPES))}; use fused='auto'"
            )
