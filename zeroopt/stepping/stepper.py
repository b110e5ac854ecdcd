"""One optimizer step on this rank's segments: by a fused kernel where there is one, for this optimizer, these dtypes and this
device, else by the optimizer's own step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError, KernelUnavailableError, StateError
from ..options.config import Config
from ..options.precision import Precision
from ..plan.params import ManagedParam
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore
from ..storage.own_shard import OwnShard
from ..weak_methods import weak_method
from .bucket_kernel import BucketKernel
from .grouping import in_groups
from .plain import call_on_leaves, step_plain
from .rules import FusedRule, fused_optimizers, rule_for


class ShardStepper:
    """Steps the own range of every bucket.

    The state lives in the wrapped optimizer's `state`, keyed by the segments' shards, whichever way a bucket is stepped.

    Attributes:
        seed: of stochastic rounding, the same on all ranks.
        refusal: the hook that lets nobody step the wrapped optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int, config: Config) -> None:
        self.seed = seed
        self._optimizer = optimizer
        self._precision = config.precision
        self._may_fuse = bool(config.fused)
        self._one_by_one = config.step_in_backward
        self._kernels: dict[int, BucketKernel] = {}
        self.refusal = optimizer.register_step_pre_hook(weak_method(self._refuse_direct_step))
        weakref.finalize(self, self.refusal.remove).atexit = False
        self.attach((), ())

    def attach(self, buckets: Sequence[Bucket], stores: Sequence[GradientStore]) -> None:
        """Go by the optimizer's groups and these buckets as they are now, and by its state for their segments."""
        self._rule = rule_for(self._optimizer) if self._may_fuse else None
        self._plain: list[OwnShard] = []
        self._fused: list[tuple[OwnShard, ops.Storage]] = []
        for bucket, store in zip(buckets, stores, strict=True):
            shard = OwnShard(bucket, store)
            storage = self._precision.storage(bucket.dtype, shard.grad_dtype)
            if self._rule is not None and storage is not None and ops.has_kernels(bucket.home):
                self._fused.append((shard, storage))
            else:
                self._plain.append(shard)
        self.reload_state()

    def reload_state(self) -> None:
        """Go by the optimizer's state as it is now: it was replaced from outside, or is about to be."""
        self._kernels.clear()

    def step(self, active: Tensor) -> Iterator[Bucket]:
        """Step the active parameters, and yield each bucket when its own range is up to date.

        The buckets that the next forward needs first come first.

        Args:
            active: uint8 [number of parameters], 1 where the parameter has a gradient.
        """
        if self._rule is not None and self._fused:
            yield from self._step_fused(self._rule, active)
        if self._plain:
            with named_range("step", f"{len(self._plain)} buckets by {type(self._optimizer).__name__}"):
                step_plain(self._optimizer, self._plain, active.tolist())
            yield from (shard.bucket for shard in reversed(self._plain))

    def order(self) -> Iterator[Bucket]:
        """The buckets in the order in which `step` yields them."""
        for shards, _ in reversed(in_groups(self._fused, one_by_one=self._one_by_one)):
            yield from (shard.bucket for shard in reversed(shards))
        yield from (shard.bucket for shard in reversed(self._plain))

    def _step_fused(self, rule: FusedRule, active: Tensor) -> Iterator[Bucket]:
        groups, flags = self._hyper_table(rule), active.tolist()
        for kernel in dict.fromkeys(reversed(self._make_kernels(rule).values())):
            self._step_kernel(kernel, flags, groups)
            yield from reversed(kernel.buckets)

    def step_bucket(self, bucket: Bucket, flags: Sequence[int]) -> None:
        """Step the active parameters of one bucket, as `step` does those of all.

        Args:
            flags: [number of parameters], 1 where the parameter has a gradient.
        """
        kernel = None if self._rule is None else self._make_kernels(self._rule).get(bucket.index)
        if kernel is not None and self._rule is not None:
            self._step_kernel(kernel, flags, self._hyper_table(self._rule))
            return
        with named_range("step", f"{bucket.name} by {type(self._optimizer).__name__}"):
            step_plain(self._optimizer, [shard for shard in self._plain if shard.bucket is bucket], flags)

    def _make_kernels(self, rule: FusedRule) -> dict[int, BucketKernel]:
        """Those of the buckets that have one, by their index; several may have the same."""
        if not self._kernels:
            for shards, storage in in_groups(self._fused, one_by_one=self._one_by_one):
                kernel = BucketKernel(shards, storage, rule, self._optimizer)
                self._kernels.update((bucket.index, kernel) for bucket in kernel.buckets)
        return self._kernels

    def _hyper_table(self, rule: FusedRule) -> Tensor:
        return torch.tensor(
            [rule.hyper_row(group) for group in self._optimizer.param_groups], dtype=torch.float64, device="cpu"
        )

    def _step_kernel(self, kernel: BucketKernel, flags: Sequence[int], groups: Tensor) -> None:
        first, *others = kernel.buckets
        with named_range("step", f"{first.name} and {len(others)} more" if others else first.name):
            kernel.step_params(flags, groups, ops.StepControl(seed=self.seed))

    def apply(self, method: Callable[[torch.optim.Optimizer], object]) -> None:
        """Call a method of the optimizer that writes parameters, with this rank's segments in their place."""
        call_on_leaves(self._optimizer, method, [*self._plain, *(shard for shard, _ in self._fused)])

    def _refuse_direct_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer is self._optimizer:
            name = type(optimizer).__name__
            raise StateError(
                f"this {name} was wrapped by zeroopt.wrap and no longer sees the gradients; "
                "call step() on the optimizer that zeroopt.wrap returned"
            )


def check_fused(optimizer: torch.optim.Optimizer, params: Sequence[ManagedParam], config: Config) -> None:
    """Check that there is a kernel where only a kernel can do what the options ask for.

    Raises:
        ConfigError: there is none for this optimizer and these dtypes.
        KernelUnavailableError: there is none for the device where parameters are stepped.
    """
    wanted = _what_needs_a_kernel(config)
    if wanted is None:
        return
    home = config.placement.home or params[0].param.device
    missing = ops.missing_kernels(home)
    if missing is not None:
        raise KernelUnavailableError(f"{wanted} needs a fused kernel, and there is none for {home}: {missing}")
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
