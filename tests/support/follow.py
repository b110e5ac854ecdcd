"""Scenarios that run on every rank under a reference and then under every stage of zeroopt, and must end alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from ulps import EXACT, SUM_ORDER_ULPS, assert_close

import zeroopt

STAGES = (0, 1, 2)
STEPS = 3
WIDTH = 12

Prepared = tuple[nn.Module, torch.optim.Optimizer]
Prepare = Callable[[nn.Module, torch.optim.Optimizer], Prepared]
Scenario = Callable[[Prepare], list[Tensor]]


def with_ddp(**options: Any) -> Prepare:
    """Wrap a model with DDP."""
    return lambda net, optimizer: (DistributedDataParallel(net, **options), optimizer)


def with_zeroopt(**options: Any) -> Prepare:
    """Wrap with zeroopt, in buckets so small that there are several."""
    return lambda net, optimizer: zeroopt.wrap(net, optimizer, **{"bucket_mb": 0.001, **options})


def averaged_by_hand(net: nn.Module, optimizer: torch.optim.Optimizer) -> Prepared:
    """The bare model, whose gradients are averaged parameter by parameter before each step: for what DDP cannot do."""

    def average(*_: object) -> None:
        for param in net.parameters():
            if param.grad is not None:
                param.grad /= dist.get_world_size()
                dist.all_reduce(param.grad)

    optimizer.register_step_pre_hook(average)
    return net, optimizer


def follow(
    scenario: Scenario,
    reference: Prepare,
    *,
    rounded: bool = False,
    stages: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """Assert that a scenario gives in every stage what it gives under the reference. Collective.

    That is bit for bit with two ranks, and up to the order of sums with more, or where `rounded` says that even two ranks
    add in another order.

    Args:
        stages: None: all of them with two ranks, on which every scenario runs. With more, stage 1 is left out, which is made of
            parts of the others.
    """
    if stages is None:
        stages = STAGES if dist.get_world_size() <= 2 else (0, 2)
    ulps = SUM_ORDER_ULPS if rounded or dist.get_world_size() > 2 else EXACT
    expected = scenario(reference)
    assert expected
    for stage in stages:
        got = scenario(with_zeroopt(stage=stage, fused=False, **options))
        for number, (want, have) in enumerate(zip(expected, got, strict=True)):
            assert_close(
                want, have, ulps, f"{scenario.__name__}, stage {stage}, value {number}, rank {dist.get_rank()}"
            )


def inputs(step: int, *shape: int) -> Tensor:
    """This rank's normal random numbers for a step."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * step + dist.get_rank()))


def values(net: nn.Module) -> list[Tensor]:
    """Copies of a model's parameters."""
    return [param.detach().clone() for param in net.parameters()]


def layers(count: int = 3) -> nn.Sequential:
    """Linear layers with the same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count)))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    """SGD, which does not make more of rounding than there is."""
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def train(prepare: Prepare, net: nn.Module, losses: Callable[[nn.Module, int], list[Tensor]]) -> list[Tensor]:
    """Run some steps, each with one backward for each of its losses, and return the parameters.

    Args:
        losses: computes them with the wrapped model, for a step.
    """
    model, optimizer = prepare(net, sgd(net))
    for step in range(STEPS):
        optimizer.zero_grad()
        for loss in losses(model, step):
            loss.backward()
        optimizer.step()
    return values(net)
