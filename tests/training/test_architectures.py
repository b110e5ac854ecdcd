"""Real architectures train under zeroopt as under DistributedDataParallel: in float32, under autocast, and in bfloat16.

Ranks compare what they have trained themselves: sending hundreds of small tensors takes longer than training does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES, Architecture, Inputs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import restore, snapshot
from ulps import EXACT, SUM_ORDER_ULPS, History, assert_close
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.options.precision import round_master

STAGES = (0, 1, 2)
STEPS = 3
BF16 = torch.bfloat16
Options = dict[str, Any]

# How a step comes by its gradients. The last two run several backward passes, of which the last one communicates, or all do.
PLAIN, AUTOCAST, NO_SYNC, ACCUMULATE = "plain", "autocast", "no_sync", "accumulate"
MICRO_BATCHES = 2


def optimizer_over(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW with an eps far above rounding: gradients that are zero but for rounding must not become whole steps."""
    return torch.optim.AdamW(params, lr=0.01, eps=1e-3, weight_decay=0.1)


def prepare(
    architecture: Architecture, net: nn.Module, options: Options | None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap with zeroopt's options, in several buckets, or with DDP for None."""
    optimizer = optimizer_over(net.parameters())
    if options is not None:
        return zeroopt.wrap(net, optimizer, bucket_mb=0.05, **options)
    return DistributedDataParallel(net, find_unused_parameters=architecture.leaves_some_unused), optimizer


def backward_passes(architecture: Architecture, rank: int, step: int, way: str) -> Iterator[tuple[Inputs, bool]]:
    """A rank's batches of a step, and whether their gradients are communicated."""
    count = MICRO_BATCHES if way in (NO_SYNC, ACCUMULATE) else 1
    for micro in range(count):
        yield architecture.batch(rank, 10 * step + micro), way != NO_SYNC or micro == count - 1


def backward(model: nn.Module, inputs: Inputs, way: str) -> float:
    dtype = next(model.parameters()).dtype
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.autocast("cpu", dtype=BF16, enabled=way == AUTOCAST):
        loss: Tensor = model(**cast).loss
    loss.backward()
    return loss.item()


def train(name: str, way: str, options: Options | None, follow: History | None = None) -> tuple[History, list[float]]:
    """Parameters and buffers after each step, and this rank's losses.

    Args:
        options: of `zeroopt.wrap`, or None for DDP.
        follow: another run's history, from whose values each step starts.
    """
    architecture = ARCHITECTURES[name]
    net = architecture.build()
    if options is not None and "param_dtype" in options and architecture.prepare_for_bfloat16 is not None:
        architecture.prepare_for_bfloat16(net)
    model, optimizer = prepare(architecture, net, options)
    history, losses = [], []
    for step in range(STEPS):
        for inputs, sync in backward_passes(architecture, dist.get_rank(), step, way):
            context: AbstractContextManager[Any] = nullcontext() if sync else model.no_sync()  # type: ignore[operator]
            with context:
                losses.append(backward(model, inputs, way))
        optimizer.step()
        optimizer.zero_grad()
        history.append(snapshot(net))
        if follow is not None:
            restore(net, follow[step])
    assert_ranks_agree(net)
    return history, losses


def follow_ddp(name: str, way: str, ulps: int, stages: Sequence[int] = STAGES, **options: Any) -> None:
    """Every stage follows DDP: in one go for 0 ulps, and otherwise step by step, so that differences do not add up."""
    expected, expected_losses = train(name, way, None)
    moved = [not torch.equal(a, b) for a, b in zip(expected[0], expected[-1], strict=True)]
    assert sum(moved) > 0.9 * len(moved) - 2, "there is nothing to compare"
    # Where not every forward is followed by communication, DDP and zeroopt send rank 0's buffers before another one of them.
    num_compared = len(list(ARCHITECTURES[name].build().parameters())) if way == NO_SYNC and dist.get_rank() else None
    for stage in stages:
        where = f"{name}, {way}, stage {stage}, rank {dist.get_rank()}"
        history, losses = train(name, way, {"stage": stage, **options}, follow=None if ulps == EXACT else expected)
        assert ulps > EXACT or losses == expected_losses, where
        for step, (want, got) in enumerate(zip(expected, history, strict=True)):
            for a, b in zip(want[:num_compared], got[:num_compared], strict=True):
                assert_close(a, b, ulps, f"{where}, step {step}")


def assert_ranks_agree(net: nn.Module) -> None:
    """Parameters are equal on all ranks. Collective."""
    mine = torch.cat([param.detach().flatten() for param in net.parameters()]).float()
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


def follow_exactly(name: str) -> None:
    for way in (PLAIN, AUTOCAST, NO_SYNC):
        follow_ddp(name, way, EXACT, fused=False)
    # The mean of sums and the sum of means are rounded differently.
    follow_ddp(name, ACCUMULATE, SUM_ORDER_ULPS, fused=False)


def follow_closely(name: str) -> None:
    """That every stage takes every way, two ranks show."""
    follow_ddp(name, PLAIN, SUM_ORDER_ULPS, stages=(0, 2))
    follow_ddp(name, NO_SYNC, SUM_ORDER_ULPS, stages=(1,))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_ranks_follow_ddp_bit_for_bit(run_on_ranks: RunOnRanks, name: str) -> None:
    run_on_ranks(2, follow_exactly, name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_three_ranks_follow_ddp(run_on_ranks: RunOnRanks, name: str) -> None:
    run_on_ranks(3, follow_closely, name)


def train_by_hand(name: str, way: str, sum_dtype: torch.dtype) -> History:
    """What the ranks do together with `param_dtype=torch.bfloat16`, in one process: gradients in bfloat16, their sum in
    `sum_dtype`, the master and its step in float32. Parameters after each step."""
    architecture, world_size = ARCHITECTURES[name], dist.get_world_size()
    net = architecture.build()
    if architecture.prepare_for_bfloat16 is not None:
        architecture.prepare_for_bfloat16(net)
    params = list(net.parameters())
    masters = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer = optimizer_over(masters)
    history = []
    for step in range(STEPS):
        for param, master in zip(params, masters, strict=True):
            param.grad = None
            param.data = round_master(master.detach(), BF16)
        for rank in range(world_size):
            net.zero_grad()
            for inputs, _ in backward_passes(architecture, rank, step, way):
                backward(net, inputs, way)
            for param, master in zip(params, masters, strict=True):
                if param.grad is not None:
                    before = torch.zeros_like(master) if master.grad is None else master.grad
                    sent = (param.grad.float() / world_size).to(BF16)
                    master.grad = (before + sent.float()).to(sum_dtype).float()
        optimizer.step()
        optimizer.zero_grad()
        history.append([round_master(master.detach(), BF16) for master in masters])
    return history


def follow_by_hand(name: str) -> None:
    by_hand = {sum_dtype: train_by_hand(name, NO_SYNC, sum_dtype) for sum_dtype in (BF16, torch.float32)}
    for stage in STAGES:
        expected = by_hand[torch.float32 if stage > 0 else BF16]
        history, _ = train(name, NO_SYNC, {"stage": stage, "param_dtype": BF16, "fused": False})
        for step, (want, got) in enumerate(zip(expected, history, strict=True)):
            for a, b in zip(want, got[: len(want)], strict=True):
                assert a.dtype is b.dtype
                assert torch.equal(a, b), f"{name}, stage {stage}, step {step}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_with_float32_masters_trains_as_by_hand(run_on_ranks: RunOnRanks, name: str) -> None:
    run_on_ranks(2, follow_by_hand, name)
