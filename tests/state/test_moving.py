"""Buckets that are planned anew: nothing changes but the order in which they travel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import OPTIMIZERS, snapshot
from worker_pool import RunOnRanks

import zeroopt


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24, bias=i % 2 == 0) for i in range(7))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x)) * self.scale
        return x


def wrapped(optimizer: str, options: dict[str, Any]) -> tuple[Backwards, Any, zeroopt.ZeroOptimizer]:
    torch.manual_seed(0)
    net = Backwards()
    model, wrapped_optimizer = zeroopt.wrap(net, OPTIMIZERS[optimizer](net.parameters()), bucket_mb=0.005, **options)
    return net, model, wrapped_optimizer


def backward(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    model(torch.randn(3, 24, generator=generator)).square().mean().backward()


def first_names(optimizer: zeroopt.ZeroOptimizer) -> list[str]:
    return [managed.name for managed in optimizer._trained.buckets[0].params]


def train(optimizer_name: str, options: dict[str, Any], replan: bool) -> tuple[list[list[Tensor]], list[str]]:
    """Train with an accumulation that goes over the first step: gradients have to move too."""
    net, model, optimizer = wrapped(optimizer_name, options)
    if not replan:
        optimizer._features.switch(optimizer._replanning, on=False)
    history = []
    for number in range(4):
        backward(model, number)
        optimizer.step()
        history.append(snapshot(net))
        if number > 0:
            optimizer.zero_grad()
    return history, first_names(optimizer)


LAYOUTS: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 2, "share_parameters": True},
    {"stage": 2, "transport": "pairwise"},
    {"stage": 2, "fused": False},
]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        *(("adamw", options) for options in LAYOUTS),
        *(("own", options) for options in LAYOUTS[:3]),
        *((name, LAYOUTS[number]) for number, name in enumerate(("sgd_momentum", "adagrad", "radam"))),
    ],
    ids=str,
)
def test_replanning_changes_no_bit(run_on_ranks: RunOnRanks, optimizer: str, options: dict[str, Any]) -> None:
    for (history, names), (expected, names_before) in zip(
        run_on_ranks(3, train, optimizer, options, True), run_on_ranks(3, train, optimizer, options, False), strict=True
    ):
        assert names_before[-1].startswith("layers.6") or names_before[0].startswith("layers.6")
        assert any(name.startswith("layers.0") for name in names)
        for step, expected_step in zip(history, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(step, expected_step, strict=True))


def resume(options: dict[str, Any]) -> bool:
    """A state dict from after the new plan goes into a fresh optimizer, and training goes on bit for bit."""
    net, model, optimizer = wrapped("adamw", options)
    for number in range(2):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    parameters, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()

    twin, twin_model, twin_optimizer = wrapped("adamw", options)
    twin_model.load_state_dict(parameters)
    twin_optimizer.load_state_dict(state)
    assert first_names(twin_optimizer) == first_names(optimizer)
    for number in range(2, 4):
        for one, one_optimizer in ((model, optimizer), (twin_model, twin_optimizer)):
            backward(one, number)
            one_optimizer.step()
            one_optimizer.zero_grad()
    return all(torch.equal(a, b) for a, b in zip(snapshot(net), snapshot(twin), strict=True))


@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2}, {"share_parameters": True}, {"fused": False}], ids=str)
def test_state_of_a_new_plan_can_be_loaded(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    assert run_on_ranks(2, resume, options) == [True, True]
