"""What of a wrapped optimizer is reachable through the one that wrap returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from follow import layers
from torch import Tensor
from worker_pool import RunOnRanks

import zeroopt


class Rich(torch.optim.SGD):
    """Has attributes of every kind."""

    kind = "rich"

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.scale, self.table, self.tensor = 1.0, {"a": (1, None)}, torch.ones(2)
        self._hidden = 3

    @staticmethod
    def rate_of(group: dict[str, Any], state: dict[str, Any]) -> float:
        return float(group["lr"]) * len(state)

    @property
    def mean_step(self) -> float:
        return float(len(self.state))

    def reset(self) -> None:
        self.state.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"] * self.scale)


def reach_all(stage: int) -> dict[str, Any]:
    net = layers()
    inner = Rich(net.parameters())
    model, optimizer = zeroopt.wrap(net, inner, stage=stage)
    got: dict[str, Any] = {}
    for name in ("kind", "scale", "table", "_hidden", "tensor", "rate_of", "mean_step", "reset", "nothing", "__len__"):
        try:
            value = getattr(optimizer, name)
            got[name] = value({"lr": 2}, {"a": 1}) if callable(value) else value
        except AttributeError as error:
            got[name] = str(error)
    before = net[0].bias.detach().clone()
    optimizer.scale = 0.0  # is the wrapped one's
    optimizer.own = 5  # is not
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    got["unmoved"] = torch.equal(before, net[0].bias.detach()) and inner.scale == 0.0
    got["own"] = vars(optimizer)["own"] == 5 and not hasattr(inner, "own")
    return got


@pytest.mark.parametrize("stage", [0, 2])
def test_plain_values_are_and_what_may_need_the_state_is_not(run_on_ranks: RunOnRanks, stage: int) -> None:
    for got in run_on_ranks(2, reach_all, stage):
        assert [got[name] for name in ("kind", "scale", "table", "_hidden")] == ["rich", 1.0, {"a": (1, None)}, 3]
        for name in ("tensor", "mean_step", "reset"):
            assert f"{name!r} of the wrapped Rich cannot be used here" in got[name]
        assert got["nothing"] == "neither ZeroOptimizer nor the Rich within has an attribute 'nothing'"
        assert "has an attribute '__len__'" in got["__len__"]
        assert got["unmoved"] and got["own"]
        assert got["rate_of"] == 2.0 if stage == 0 else "'rate_of' of the wrapped Rich cannot be used" in got["rate_of"]


def follow_adafactor_schedule() -> list[list[Tensor]]:
    """transformers' scheduler, which asks Adafactor for its rates, under stage 0 and without zeroopt."""
    from transformers.optimization import Adafactor, AdafactorSchedule

    results = []
    for wraps in (False, True):
        net = model = layers()
        optimizer = Adafactor(net.parameters(), lr=None, relative_step=True, warmup_init=True)
        if wraps:
            model, optimizer = zeroopt.wrap(net, optimizer, stage=0, fused=False)
        scheduler = AdafactorSchedule(optimizer)
        rates = []
        for step in range(3):
            model(torch.full((2, 12), step + 1.0)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            rates.append(torch.tensor(scheduler.get_lr()))
            optimizer.zero_grad()
        results.append([*rates, *(param.detach().clone() for param in net.parameters())])
    return results


def test_adafactor_schedule(run_on_ranks: RunOnRanks) -> None:
    for plain, wrapped in run_on_ranks(2, follow_adafactor_schedule):
        for expected, got in zip(plain, wrapped, strict=True):
            torch.testing.assert_close(got, expected)
