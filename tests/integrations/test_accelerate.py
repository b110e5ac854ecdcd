"""Accelerate's `prepare` with zeroopt trains as it does with DistributedDataParallel."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from follow import WIDTH, inputs, layers, values
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worker_pool import RunOnRanks

import zeroopt

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from accelerators import accelerator

from zeroopt.integrations.accelerate import ZeroAccelerator, enable, plain_optimizer

STEPS = 6

Trained = tuple[Any, Any, Any]
Prepare = Callable[[Accelerator, nn.Module, torch.optim.Optimizer, Any], Trained]


def together(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Trained:
    return acc.prepare(model, optimizer, scheduler)  # type: ignore[no-any-return]


def backwards(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Trained:
    scheduler, optimizer, model = acc.prepare(scheduler, optimizer, model)
    return model, optimizer, scheduler


def model_first(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Trained:
    return acc.prepare(model), acc.prepare(optimizer), acc.prepare(scheduler)


def optimizer_first(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Trained:
    optimizer = acc.prepare(optimizer)
    scheduler = acc.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.lr_lambdas[0]))
    return acc.prepare(model), optimizer, scheduler


def train(acc: Accelerator, prepare: Prepare = together, max_norm: float | None = None) -> list[Tensor]:
    """Losses, learning rates, norms and parameters of some accumulated steps."""
    net = layers()
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, scheduler = prepare(acc, net, optimizer, scheduler)
    assert isinstance(model, zeroopt.ZeroDataParallel if isinstance(acc, ZeroAccelerator) else DistributedDataParallel)
    seen: list[Tensor] = []
    for number in range(STEPS):
        with acc.accumulate(model):
            loss = model(inputs(number, 4, WIDTH)).square().mean()
            acc.backward(loss)
            if max_norm is not None and acc.sync_gradients:
                seen.append(acc.clip_grad_norm_(model.parameters(), max_norm))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seen += [loss.detach(), torch.tensor(scheduler.get_last_lr())]
    assert acc.unwrap_model(model) is extract_model_from_parallel(model) is net
    return [*seen, *values(net)]


def follow_ddp(prepare: Prepare) -> None:
    with accelerator(gradient_accumulation_steps=2) as acc:
        expected = train(acc)
    for stage in (0, 1, 2):
        with accelerator(gradient_accumulation_steps=2) as acc:
            assert enable(acc, stage=stage, fused=False) is acc
            assert enable(acc, stage=stage, fused=False) is acc
            got = train(acc, prepare)
            assert all(map(torch.equal, expected, got)), stage
            assert [plain_optimizer(one).stage for one in acc._optimizers] == [stage]


@pytest.mark.parametrize("prepare", [together, backwards, model_first, optimizer_first])
def test_prepare_in_any_order_trains_like_ddp(run_on_ranks: RunOnRanks, prepare: Prepare) -> None:
    run_on_ranks(2, follow_ddp, prepare)


def pickled_accelerator() -> None:
    class Own(Accelerator):  # type: ignore[misc]
        pass

    with accelerator() as acc:
        enable(acc)
        assert type(acc) is ZeroAccelerator and isinstance(acc, Accelerator)
        again = pickle.loads(pickle.dumps(acc))
        assert type(again) is ZeroAccelerator and again.zeroopt_options == {"stage": 2}
    with accelerator() as acc:
        acc.__class__ = Own
        enable(acc)
        assert isinstance(acc, Own)


def test_an_accelerator_stays_what_it_was(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(1, pickled_accelerator)
