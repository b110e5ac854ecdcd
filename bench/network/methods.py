"""What trains over slow links; a new method is an entry in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

import zeroopt

ALONE = "no communication"
DDP = "DDP"
AVERAGE_EVERY = 4
OUTER_EVERY = 20
POWER_SGD_RANK = 4
ONE_BUCKET_MB = 1 << 20

Wrapped: TypeAlias = tuple[nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True)
class Place:
    """Process groups of a rank.

    Attributes:
        inside: the ranks of its host.
        across: those with the same place on the other hosts.
    """

    inside: dist.ProcessGroup
    across: dist.ProcessGroup

    @classmethod
    def find(cls, num_hosts: int, ranks_a_host: int) -> Place:
        """Of this rank. Collective."""
        rank = dist.get_rank()
        hosts = [range(host * ranks_a_host, (host + 1) * ranks_a_host) for host in range(num_hosts)]
        lanes = [[ranks[lane] for ranks in hosts] for lane in range(ranks_a_host)]
        inside, across = ([dist.new_group(list(ranks)) for ranks in groups] for groups in (hosts, lanes))
        return cls(inside[rank // ranks_a_host], across[rank % ranks_a_host])


Prepare = Callable[[nn.Module, torch.optim.Optimizer, Place], Wrapped]


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        prepare: wraps a model and its optimizer. Every rank calls it.
        period: steps after which it repeats what it does.
        is_local: ranks, or hosts, train alone between two averages: its losses are no other method's.
    """

    prepare: Prepare
    period: int = 1
    is_local: bool = False


def alone(model: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> Wrapped:
    return model, optimizer


def ddp(model: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> Wrapped:
    return DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer


def ddp_in_bfloat16(model: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> Wrapped:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # DDP refuses torch's own hook without NCCL where it knows it by its name.
    wrapped.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket))
    return wrapped, optimizer


def ddp_power_sgd(model: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> Wrapped:
    # One bucket: the hook starts its later collectives when its earlier ones end, which for several buckets is in another
    # order on another rank, and Gloo then takes one for the other.
    wrapped = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET_MB)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=POWER_SGD_RANK, start_powerSGD_iter=2)
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return wrapped, optimizer


def post_local_sgd(model: nn.Module, optimizer: torch.optim.Optimizer, place: Place) -> Wrapped:
    """Gradients are averaged within a host, parameters over all hosts from time to time."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    state = post_localSGD_hook.PostLocalSGDState(None, place.inside, 1)  # type: ignore[no-untyped-call]
    wrapped.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    averager = PeriodicModelAverager(period=AVERAGE_EVERY, warmup_steps=0)
    return wrapped, PostLocalSGDOptimizer(optimizer, averager)


def zero(**options: Any) -> Prepare:
    return lambda model, optimizer, place: zeroopt.wrap(model, optimizer, **options)


def zero_averaging(**options: Any) -> Prepare:
    """ZeRO within a host, parameters averaged over hosts from time to time."""
    return lambda model, optimizer, place: zeroopt.wrap(
        model,
        optimizer,
        process_group=place.inside,
        average_group=place.across,
        average_every=AVERAGE_EVERY,
        **options,
    )


def zero_outer_steps(**options: Any) -> Prepare:
    """ZeRO within a host, and outer steps over hosts (DiLoCo)."""
    return lambda model, optimizer, place: zeroopt.wrap(
        model,
        optimizer,
        process_group=place.inside,
        average_group=place.across,
        average_every=OUTER_EVERY,
        outer_optimizer=_nesterov,
        **options,
    )


def _nesterov(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


METHODS: dict[str, Method] = {
    ALONE: Method(alone, is_local=True),
    DDP: Method(ddp),
    "DDP, bfloat16 hook": Method(ddp_in_bfloat16),
    f"DDP, PowerSGD hook of rank {POWER_SGD_RANK}": Method(ddp_power_sgd),
    f"DDP, post-local SGD every {AVERAGE_EVERY}": Method(post_local_sgd, AVERAGE_EVERY, is_local=True),
    "zeroopt stage 2": Method(zero(stage=2)),
    "zeroopt stage 2, 4 buffers": Method(zero(stage=2, bucket_buffers=4)),
    "zeroopt stage 1": Method(zero(stage=1)),
    "zeroopt stage 2, pairwise": Method(zero(stage=2, transport="pairwise")),
    "zeroopt stage 2, bfloat16 gradients": Method(zero(stage=2, reduce_dtype=torch.bfloat16)),
    "zeroopt stage 2, int8 gradients": Method(zero(stage=2, gradient_compression="int8")),
    "zeroopt stage 2, int4 gradients": Method(zero(stage=2, gradient_compression="int4")),
    "zeroopt stage 2, int8 gradients and parameters": Method(
        zero(stage=2, gradient_compression="int8", parameter_compression="int8")
    ),
    "zeroopt stage 2, int4 gradients and parameters": Method(
        zero(stage=2, gradient_compression="int4", parameter_compression="int4")
    ),
    "zeroopt stage 2, bfloat16, int8 gradients": Method(
        zero(stage=2, param_dtype=torch.bfloat16, cast_inputs=False, gradient_compression="int8")
    ),
    "zeroopt stage 2, bfloat16": Method(zero(stage=2, param_dtype=torch.bfloat16, cast_inputs=False)),
    f"zeroopt stage 2, average_every={AVERAGE_EVERY}": Method(zero_averaging(stage=2), AVERAGE_EVERY, is_local=True),
    f"zeroopt stage 2, DiLoCo every {OUTER_EVERY}": Method(zero_outer_steps(stage=2), OUTER_EVERY, is_local=True),
    f"zeroopt stage 2, DiLoCo every {OUTER_EVERY}, 4 fragments of int8": Method(
        zero_outer_steps(stage=2, outer_fragments=4, outer_delay=4, outer_dtype="int8"), OUTER_EVERY, is_local=True
    ),
}
"""In the order of the rows."""
