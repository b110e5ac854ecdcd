"""The probe that tells element-wise optimizers from others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from training import OPTIMIZERS

import zeroopt
from zeroopt.elementwise import check_elementwise


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_element_wise_optimizers_pass_and_stay_as_they_are(name: str) -> None:
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(()))]
    optimizer = OPTIMIZERS[name](params)
    attributes = dict(vars(optimizer))
    state = {p: dict(s) for p, s in optimizer.state.items()}
    check_elementwise(optimizer)
    assert vars(optimizer) == attributes
    assert {p: dict(s) for p, s in optimizer.state.items()} == state
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)


class CentredSgd(torch.optim.Optimizer):
    """Takes the mean of each gradient's rows off, as gradient centralisation does."""

    def __init__(self, params: Any, centred: bool) -> None:
        super().__init__(params, {"lr": 0.1, "centred": centred})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if group["centred"] and grad.dim() > 1:
                    grad = grad - grad.mean(dim=1, keepdim=True)
                param.sub_(grad, alpha=group["lr"])


class StateFromTheStart(torch.optim.Optimizer):
    """Makes its state in the constructor and counts on it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"steps": 0, "sum": torch.full_like(param, 0.5)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["steps"] += 1
                state["sum"].addcmul_(param.grad, param.grad)
                param.addcdiv_(param.grad, state["sum"].sqrt(), value=-group["lr"] / state["steps"])


def test_each_group_is_asked() -> None:
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))]
    groups = [{"params": params[:1], "centred": False}, {"params": params[1:], "centred": True}]
    check_elementwise(CentredSgd(groups[:1], centred=False))
    with pytest.raises(zeroopt.NotSupportedError, match="CentredSgd is not element-wise"):
        check_elementwise(CentredSgd(groups, centred=False))


def test_state_made_by_the_constructor() -> None:
    optimizer = StateFromTheStart([nn.Parameter(torch.ones(3, 4))])
    check_elementwise(optimizer)
    assert [entry["steps"] for entry in optimizer.state.values()] == [0]


def test_after_steps_and_with_a_scheduler() -> None:
    param = nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.RAdam([param])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    param.sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[param].items()}
    check_elementwise(optimizer)
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[param].items())
