"""The probe that tells how small the pieces may be that an optimizer steps."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training import OPTIMIZERS
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.plan.params import Grain
from zeroopt.probing.grains import ELEMENT_WISE, find_grains


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


class LearnsItsRate(torch.optim.Optimizer):
    """Learns a factor of its rate from all parameters, as Prodigy does: at first it is far too small to be seen in them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "d": 1e-30, "seen": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["seen"] += sum(float(p.grad.square().sum()) for p in group["params"] if p.grad is not None)
            group["d"] = max(group["d"], 1e-30 * group["seen"])
            for param in group["params"]:
                param.sub_(param.grad.sign(), alpha=group["lr"] * group["d"])
                param.sub_(param.grad.sign(), alpha=group["lr"])


class CoupledAttribute(LearnsItsRate):
    """The same, kept in the optimizer itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            self.seen = group["seen"]
            group["seen"] = group["d"] = 0.0


class CoupledLater(torch.optim.Optimizer):
    """Divides by the norm over all gradients, but only after a warm-up or in some of the steps; counts in one of three places."""

    def __init__(self, params: Any, where: str, begin: int = 0, every: int = 1) -> None:
        super().__init__(params, {"lr": 0.1, "begin": begin, "every": every, "k": 0})
        self.where, self.calls = where, 0

    def count(self, group: dict[str, Any], param: nn.Parameter) -> int:
        if self.where == "option":
            return int(group["k"])
        if self.where == "attribute":
            return self.calls
        self.state[param]["step"] = self.state[param].get("step", torch.zeros(())) + 1
        return int(self.state[param]["step"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        for group in self.param_groups:
            group["k"] += 1
            for param in group["params"]:
                count = self.count(group, param)
                coupled = count >= group["begin"] and count % group["every"] == 0
                param.sub_(param.grad / (norm if coupled else 1), alpha=group["lr"])


class FactorsLargeOnes(torch.optim.Optimizer):
    """Takes means of rows from a size on, as Adafactor does in some libraries."""

    def __init__(self, params: Any, smallest: int) -> None:
        super().__init__(params, {"lr": 0.1, "smallest": smallest})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.dim() > 1 and min(param.shape[:2]) >= group["smallest"]:
                    param.sub_(param.grad - param.grad.mean(dim=0, keepdim=True), alpha=group["lr"])
                else:
                    param.sub_(param.grad, alpha=group["lr"])


class RoundsBlocks(torch.optim.Optimizer):
    """Quantises gradients of 4096 elements or more by the largest of each block, where blocks of 256 divide them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            grad = param.grad
            if grad.numel() >= 4096 and grad.numel() % 256 == 0:
                blocks = grad.reshape(-1, 256)
                scale = blocks.abs().amax(dim=1, keepdim=True) / 7
                grad = ((blocks / scale).round() * scale).view_as(grad)
            param.sub_(grad, alpha=self.param_groups[0]["lr"])


class OwnDict(torch.optim.Optimizer):
    """Momentum in an attribute, by parameter or by its address, instead of in `state`."""

    def __init__(self, params: Any, key: Any = lambda param: param) -> None:
        super().__init__(params, {"lr": 0.1})
        self.moments: dict[Any, torch.Tensor] = {}
        self.key = key

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            moment = self.moments.setdefault(self.key(param), torch.zeros_like(param)).mul_(0.9).add_(param.grad)
            param.sub_(moment, alpha=0.1)


class OwnList(torch.optim.SGD):
    """Steps its own list of parameters."""

    def __init__(self, params: Any) -> None:
        self.mine = list(params)
        super().__init__(self.mine, lr=0.1)


class GlobalState(torch.optim.SGD):
    """Counts under a name that is no parameter."""

    def step(self, closure: Any = None) -> Any:
        self.state["k"] = self.state.get("k", 0) + 1
        return super().step(closure)


class FirstHasMore(torch.optim.SGD):
    """Keeps what belongs to all in the state of the first one."""

    def step(self, closure: Any = None) -> Any:
        first = self.param_groups[0]["params"][0]
        self.state[first]["calls"] = self.state[first].get("calls", 0) + 1
        return super().step(closure)


class Quantised(torch.Tensor):
    """Codes that nobody may copy."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("clone", "detach"):
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


class KeepsQuantised(torch.optim.SGD):
    """Momentum in tensors of a class of their own, as torchao has it."""

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            self.state[param].setdefault("codes", torch.zeros_like(param).as_subclass(Quantised))
        return super().step(closure)


class Lookahead(torch.optim.Optimizer):
    """Slow weights around another optimizer, with which it shares param_groups."""

    def __init__(self, params: Any, k: int = 5) -> None:
        self.base = torch.optim.AdamW(params, lr=0.1)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups, self.k, self.calls = self.base.param_groups, k, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.calls += 1
        if self.calls % self.k == 0:
            for param in self.param_groups[0]["params"]:
                slow = self.state[param].setdefault("slow", param.detach().clone())
                param.copy_(slow.lerp_(param, 0.5))


class Langevin(torch.optim.Optimizer):
    """Adds noise to each element (SGLD)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad, alpha=0.1).add_(torch.randn_like(param), alpha=1e-3)


class RoundsStochastically(torch.optim.Optimizer):
    """Rounds 16-bit parameters by chance, and no others."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            exact = param.float() - 0.1 * param.grad.float()
            if param.dtype is torch.bfloat16:
                bits = exact.view(torch.int32) + torch.randint_like(exact, 0, 1 << 16, dtype=torch.int32)
                exact = (bits & -65536).view(torch.float32)
            param.copy_(exact)


class RmsInState(torch.optim.Optimizer):
    """Notes a norm of each parameter, which it does not use: state of pieces is not that of the whole."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            self.state[param]["rms"] = float(param.square().mean().sqrt())
            param.sub_(param.grad, alpha=0.1)


class TrainsOnDemand(torch.optim.SGD):
    """Steps after `train()` only, as schedule-free optimizers do; its rate is a tensor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=torch.tensor(0.1), foreach=False)
        self.is_training = False

    def train(self) -> None:
        self.is_training = True

    def step(self, closure: Any = None) -> Any:
        assert self.is_training
        assert isinstance(self.param_groups[0]["lr"], torch.Tensor)
        return super().step(closure)


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


def test_sizes_from_which_a_rule_is_another_one() -> None:
    for smallest in (16, 32, 128):
        assert find_grains(FactorsLargeOnes(params_of((15, 200), (300,)), smallest)) == [Grain.ELEMENT]
        assert find_grains(FactorsLargeOnes(params_of((3, 4), (200, 300)), smallest)) == [Grain.PARAMETER]
    assert find_grains(FactorsLargeOnes(params_of((64, 40, 3, 3)), 32)) == [Grain.PARAMETER]
    assert find_grains(RoundsBlocks(params_of((64, 63), (4095,)))) == [Grain.ELEMENT]
    for shape in ((64, 64), (512, 512), (8192,), (20, 256)):
        assert find_grains(RoundsBlocks(params_of((3, 4), (101, 99), shape))) == [Grain.PARAMETER]


def test_state_of_pieces_has_to_be_that_of_the_whole() -> None:
    assert find_grains(RmsInState(params_of((3, 4)))) == [Grain.PARAMETER]


class HasTable(torch.optim.SGD):
    """Has a table of as many elements as a parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.table = torch.arange(256.0)


def test_tables_are_no_state() -> None:
    assert find_grains(HasTable(params_of((16, 16), (3, 4)))) == [Grain.ELEMENT]


def test_an_optimizer_that_has_to_be_told_to_train_and_a_rate_that_is_a_tensor() -> None:
    optimizer = TrainsOnDemand(params_of((3, 4)))
    assert find_grains(optimizer) == [Grain.ELEMENT]
    assert not optimizer.is_training


class CountsTrials(torch.optim.SGD):
    """Reads an option of each group, and counts how often it is copied for a trial."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        CountsTrials.steps += 1
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["scale"]
        return super().step(closure)


def test_groups_that_differ_in_what_a_step_does_not_read_are_tried_once() -> None:
    def steps_for(**options: list[Any]) -> int:
        CountsTrials.steps = 0
        groups: list[dict[str, Any]] = [{"params": params_of((3, 4)), "scale": 1.0} for _ in range(4)]
        for name, values in options.items():
            for group, value in zip(groups, values, strict=True):
                group[name] = value
        assert find_grains(CountsTrials(groups, lr=0.1)) == [Grain.ELEMENT] * 4
        return CountsTrials.steps

    once = steps_for()
    assert steps_for(lr=[0.1, 0.2, 0.3, 0.4], name=["a", "b", "c", "d"]) == once
    assert steps_for(scale=[1.0, 0.9, 1.0, 0.9]) == 2 * once
    assert steps_for(weight_decay=[0.0, 0.1, 0.2, 0.3]) == 4 * once


@pytest.mark.parametrize("cls", sorted(ELEMENT_WISE, key=lambda cls: cls.__name__))
def test_the_classes_that_are_not_tried_pass_the_trial(cls: type[torch.optim.Optimizer]) -> None:
    again = type(f"Again{cls.__name__}", (cls,), {})
    assert find_grains(again(params_of((), (3, 4), (200, 300), (5000,)), lr=0.1)) == [Grain.ELEMENT]


def test_trying_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    with pytest.raises(zeroopt.NotSupportedError):
        find_grains(Langevin(params_of((3, 4))))
    assert torch.equal(torch.get_rng_state(), before)


def test_refuses_what_the_optimizer_already_keeps_of_its_parameters() -> None:
    optimizer = OwnDict(params_of((3, 4)))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    optimizer.step()
    before = {param: moment.clone() for param, moment in optimizer.moments.items()}
    with pytest.raises(zeroopt.NotSupportedError, match="references to parameters in its attribute 'moments'"):
        find_grains(optimizer)
    assert all(torch.equal(optimizer.moments[param], moment) for param, moment in before.items())


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
        (LearnsItsRate, "LearnsItsRate steps a parameter differently .*: the option 'd' differs"),
        (CoupledAttribute, "the attribute 'seen' differs, which it learns from all of them"),
        (partial(CoupledLater, where="option", begin=100), "CoupledLater steps a parameter differently"),
        (partial(CoupledLater, where="attribute", begin=5000), "CoupledLater steps a parameter differently"),
        (partial(CoupledLater, where="state", begin=9), "CoupledLater steps a parameter differently"),
        (partial(CoupledLater, where="state", every=500), "CoupledLater steps a parameter differently"),
        (partial(CoupledLater, where="option", every=2000), "CoupledLater steps a parameter differently"),
        (FirstHasMore, "the parameter's state 'calls' differs"),
        (OwnDict, "OwnDict keeps references to parameters in its attribute 'moments'"),
        (partial(OwnDict, key=id), "OwnDict keeps references to parameters in its attribute 'moments'"),
        (partial(OwnDict, key=str), "OwnDict keeps tensors for parameters in its attribute 'moments'"),
        (OwnList, "OwnList keeps references to parameters in its attribute 'mine'"),
        (GlobalState, "GlobalState keeps state under 'k', which is no parameter"),
        pytest.param(
            KeepsQuantised,
            "KeepsQuantised keeps state in tensors of the class Quantised",
            marks=pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch before 2.6 cannot step it"),
        ),
        (Lookahead, "Lookahead keeps another optimizer, AdamW, in its attribute 'base'"),
        (Langevin, "Langevin draws random numbers in its step"),
    ],
)
def test_refuses(optimizer: Any, message: str) -> None:
    with pytest.raises(zeroopt.NotSupportedError, match=message):
        find_grains(optimizer(params_of((3, 4))))


def test_random_numbers_for_16_bits_alone() -> None:
    assert find_grains(RoundsStochastically(params_of((3, 4)))) == [Grain.ELEMENT]
    params = [param.to(torch.bfloat16) for param in params_of((3, 4))]
    with pytest.raises(zeroopt.NotSupportedError, match="RoundsStochastically draws random numbers"):
        find_grains(RoundsStochastically([nn.Parameter(param.detach()) for param in params]))


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
