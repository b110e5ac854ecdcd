"""The probe that tells how small the pieces may be that an optimizer steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training import OPTIMIZERS
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.bucket import Grain
from zeroopt.elementwise import find_grains


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_element_wise_optimizers_pass_and_stay_as_they_are(name: str) -> None:
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(()))]
    optimizer = OPTIMIZERS[name](params)
    attributes = dict(vars(optimizer))
    state = {p: dict(s) for p, s in optimizer.state.items()}
    assert find_grains(optimizer) == [Grain.ELEMENT]
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


class MatricesAndVectors(torch.optim.Optimizer):
    """Centres gradients of more than three dimensions only, as convolutions' are."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad.dim() > 3:
                    grad = grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True)
                param.sub_(grad, alpha=group["lr"])


class ClippedAdamW(torch.optim.AdamW):
    """Clips by the norm of all gradients; AdamW hides a factor that is the same in every step."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        return super().step(closure)


class SharedScale(torch.optim.Optimizer):
    """Learns one step size from all parameters of a group, as Prodigy does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "total": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["total"] += sum(float(p.grad.abs().sum()) for p in group["params"])
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"] / group["total"])


class RunningNorm(torch.optim.Optimizer):
    """Scales each parameter by what came before it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        norm = 0.0
        for group in self.param_groups:
            for param in group["params"]:
                norm += float(param.grad.norm())
                param.sub_(param.grad, alpha=group["lr"] / norm)


class Communicating(torch.optim.SGD):
    """Averages its gradients itself."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                dist.all_reduce(param.grad)
        return super().step(closure)


class NeedsClosure(torch.optim.SGD):
    """Calls the model a second time within a step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step()


def params_of(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


def test_each_group_is_asked() -> None:
    params = params_of((3, 4), (3, 4))
    groups = [{"params": params[:1], "centred": False}, {"params": params[1:], "centred": True}]
    assert find_grains(CentredSgd(groups[:1], centred=False)) == [Grain.ELEMENT]
    assert find_grains(CentredSgd(groups, centred=False)) == [Grain.ELEMENT, Grain.PARAMETER]


def test_what_the_parameters_look_like_matters() -> None:
    assert find_grains(CentredSgd(params_of((7,), ()), centred=True)) == [Grain.ELEMENT]
    assert find_grains(MatricesAndVectors(params_of((7,), (3, 4), (2, 3, 4)))) == [Grain.ELEMENT]
    assert find_grains(MatricesAndVectors(params_of((7,), (2, 3, 4, 5)))) == [Grain.PARAMETER]
    frozen = params_of((7,), (2, 3, 4, 5, 6))
    frozen[1].requires_grad_(False)
    assert find_grains(MatricesAndVectors(frozen)) == [Grain.ELEMENT]


def whole_optimizers() -> dict[str, tuple[torch.optim.Optimizer, Grain]]:
    """Those that need whole parameters, as far as this torch has them, and what of them."""
    found: dict[str, tuple[torch.optim.Optimizer, Grain]] = {
        "FusedLAMB": (zeroopt.optim.FusedLAMB(params_of((3, 4), (5,))), Grain.PARAMETER)
    }
    if hasattr(torch.optim, "Adafactor"):
        found["Adafactor"] = (torch.optim.Adafactor(params_of((3, 4), (5,))), Grain.PARAMETER)
    if hasattr(torch.optim, "Muon"):
        found["Muon"] = (torch.optim.Muon(params_of((3, 4), (5, 2))), Grain.MATRIX)
    return found


@pytest.mark.parametrize("name", whole_optimizers())
def test_whole_parameters(name: str) -> None:
    """Also after steps, when there is state of other shapes than the probe's."""
    optimizer, grain = whole_optimizers()[name]
    assert find_grains(optimizer) == [grain]
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    assert find_grains(optimizer) == [grain]
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "LBFGS calls the model several times a step"),
        (ClippedAdamW, "ClippedAdamW steps a parameter differently when others are stepped with it"),
        (SharedScale, "SharedScale steps a parameter differently"),
        (RunningNorm, "RunningNorm steps a parameter differently"),
        (NeedsClosure, "NeedsClosure could not step a parameter of 2 dimensions by itself"),
    ],
)
def test_refuses(optimizer: Any, message: str) -> None:
    with pytest.raises(zeroopt.NotSupportedError, match=message):
        find_grains(optimizer(params_of((3, 4))))


def probe_one_that_communicates() -> str:
    """On one rank alone: it would wait for the other for ever."""
    if dist.get_rank() > 0:
        return ""
    with pytest.raises(zeroopt.NotSupportedError) as caught:
        find_grains(Communicating(params_of((3, 4))))
    return str(caught.value)


def test_refuses_communication_at_once(run_on_ranks: RunOnRanks) -> None:
    assert "its step communicates with other ranks" in run_on_ranks(2, probe_one_that_communicates)[0]


def test_state_made_by_the_constructor() -> None:
    optimizer = StateFromTheStart([nn.Parameter(torch.ones(3, 4))])
    assert find_grains(optimizer) == [Grain.ELEMENT]
    assert [entry["steps"] for entry in optimizer.state.values()] == [0]


def test_after_steps_and_with_a_scheduler() -> None:
    param = nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.RAdam([param])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    param.sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[param].items()}
    assert find_grains(optimizer) == [Grain.ELEMENT]
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[param].items())
