"""Averages of parameters that other packages keep are those that they keep under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from follow import Prepare, follow, inputs, sgd, values, with_ddp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt

STEPS = 6
WIDTH = 12

Average = Callable[[nn.Module, nn.Module], Any]


def net_with_buffers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 5))


def train(prepare: Prepare, average: Average, update: Callable[[Any, nn.Module], None]) -> tuple[nn.Module, Any]:
    """The net, and its average of all steps.

    Args:
        average: made of the wrapped model and the bare one.
    """
    net = net_with_buffers()
    model, optimizer = prepare(net, sgd(net))
    kept = average(model, net)
    for step in range(STEPS):
        loss_of(model(inputs(step, 4, WIDTH))).backward()
        optimizer.step()
        update(kept, model)
        optimizer.zero_grad()
    return net, kept


def contents(module: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in (*module.parameters(), *module.buffers())]


def average_by_torch(prepare: Prepare) -> list[Tensor]:
    net, mean = train(prepare, lambda model, _: AveragedModel(model), AveragedModel.update_parameters)
    update_bn([inputs(99, 4, WIDTH)], mean)
    _, moving = train(
        prepare,
        lambda model, _: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        AveragedModel.update_parameters,
    )
    return [*values(net), *contents(mean), *contents(moving)]


def average_by_ema_pytorch(prepare: Prepare) -> list[Tensor]:
    """After each step, by a hook of the optimizer, and with a part of the average written back into the model."""
    from ema_pytorch import EMA

    options = {"beta": 0.9, "update_after_step": 1, "update_every": 1}
    _, plain = train(prepare, lambda model, _: EMA(model, **options), lambda kept, _: kept.update())
    _, of_net = train(prepare, lambda _, net: EMA(net, use_foreach=True, **options), lambda kept, _: kept.update())
    back = {"update_model_with_ema_every": 2, "update_model_with_ema_beta": 0.5, **options}
    net, written = train(prepare, lambda model, _: EMA(model, **back), lambda kept, _: kept.update())
    return [*contents(plain.ema_model), *contents(of_net.ema_model), *contents(written.ema_model), *values(net)]


def average_in_a_hook(prepare: Prepare) -> list[Tensor]:
    from ema_pytorch import EMA

    net = net_with_buffers()
    model, optimizer = prepare(net, sgd(net))
    kept = EMA(model, beta=0.9, update_after_step=1, update_every=1)
    kept.add_to_optimizer_post_step_hook(optimizer)
    for step in range(STEPS):
        loss_of(model(inputs(step, 4, WIDTH))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return contents(kept.ema_model)


def average_on_rank_0(prepare: Prepare) -> list[Tensor]:
    """It needs no other rank, so one may keep it for all."""
    is_first = dist.get_rank() == 0
    _, kept = train(
        prepare,
        lambda model, _: AveragedModel(model) if is_first else None,
        lambda kept, model: kept.update_parameters(model) if is_first else None,
    )
    return contents(kept) if is_first else [torch.zeros(1)]


def follow_all(scenario: Callable[[Prepare], list[Tensor]]) -> None:
    follow(scenario, with_ddp())


@pytest.mark.parametrize("scenario", [average_by_torch, average_on_rank_0])
def test_averaged_models_of_torch(run_on_ranks: RunOnRanks, scenario: Callable[[Prepare], list[Tensor]]) -> None:
    run_on_ranks(2, follow_all, scenario)


@pytest.mark.parametrize("scenario", [average_by_ema_pytorch, average_in_a_hook])
def test_ema_pytorch(run_on_ranks: RunOnRanks, scenario: Callable[[Prepare], list[Tensor]]) -> None:
    pytest.importorskip("ema_pytorch")
    run_on_ranks(2, follow_all, scenario)


def average_what_is_16_bit() -> tuple[list[Tensor], list[Tensor]]:
    """An average in float32, made before wrapping, of parameters that wrapping makes 16-bit; and the same by hand."""
    from ema_pytorch import EMA

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 5))
    kept = EMA(net, beta=0.5, update_after_step=0, update_every=1, coerce_dtype=True, include_online_model=False)
    model, optimizer = zeroopt.wrap(net, sgd(net), param_dtype=torch.bfloat16, cast_inputs=True, bucket_mb=0.001)
    by_hand: list[Tensor] = []
    for step in range(STEPS):
        loss_of(model(inputs(step, 4, WIDTH)).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.update()
        now = [param.detach().float() for param in net.parameters()]
        weight = 1 - kept.get_current_decay()
        by_hand = [mine.lerp(value, weight) for mine, value in zip(by_hand, now, strict=True)] if step else now
    return contents(kept.ema_model), by_hand


def test_an_average_may_be_more_exact_than_the_parameters(run_on_ranks: RunOnRanks) -> None:
    pytest.importorskip("ema_pytorch")
    for kept, by_hand in run_on_ranks(2, average_what_is_16_bit):
        assert all(value.dtype is torch.float32 for value in kept)
        assert all(map(torch.equal, kept, by_hand))
