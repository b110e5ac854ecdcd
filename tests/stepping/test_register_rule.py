"""An optimizer class from outside of the package, stepped by one of the package's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from training import batch, build, ddp, loss_of
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import ConfigError, ops
from zeroopt.optim import FusedAdamW
from zeroopt.stepping import rules
from zeroopt.stepping.rules import FusedRule, register_rule, rule_for

STEPS = 4


class House(torch.optim.Optimizer):
    """AdamW as somebody else might write it, with options of other names."""

    def __init__(self, params: Iterable[Any], rate: float = 1e-2, decay: float = 0.1) -> None:
        super().__init__(params, {"rate": rate, "betas": (0.9, 0.99), "eps": 1e-8, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad, group)

    def _step(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        param.mul_(1 - group["rate"] * group["decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step = float(state["step"])
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        param.addcdiv_(state["exp_avg"], root, value=-group["rate"] / (1 - beta1**step))


@dataclass(frozen=True)
class HouseRule(FusedRule):
    kernel: ops.StepKernel = ops.adamw

    def hyper_parameter(self, group: dict[str, Any], column: str) -> float:
        own = {"lr": "rate", "weight_decay": "decay"}
        fixed = {"decoupled": 1.0, "amsgrad": 0.0, "maximize": 0.0}
        return fixed[column] if column in fixed else super().hyper_parameter(group, own.get(column, column))


@contextmanager
def registered(rule: FusedRule) -> Iterator[None]:
    with patch.dict(rules._RULES):
        register_rule(House, rule)
        yield


def trained(options: dict[str, Any] | None) -> tuple[list[Tensor], set[str]]:
    """The parameters, and the names of state: of `House` wrapped with these options, or without any of the kernel under DDP."""
    net = build("mlp")
    with registered(HouseRule()):
        if options is None:
            model, optimizer = ddp(net, FusedAdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1))
        else:
            wrapped, optimizer = zeroopt.wrap(net, House(net.parameters()), **options)
            model = wrapped
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs = batch("mlp", step).to(next(net.parameters()).dtype)
            loss_of(model(inputs)).backward()
            optimizer.step()
    names = {name for state in optimizer.state.values() for name in state}
    return [param.detach().clone() for param in net.parameters()], names


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_trains_by_the_kernel_as_that_does_under_ddp(run_on_ranks: RunOnRanks, stage: int) -> None:
    expected, state = run_on_ranks(2, trained, None)[0]
    for params, names in run_on_ranks(2, trained, {"stage": stage, "fused": True}):
        assert names == state
        for got, want in zip(params, expected, strict=True):
            assert torch.equal(got, want)


def test_has_the_storages_of_the_kernel(run_on_ranks: RunOnRanks) -> None:
    options = {"stage": 2, "param_dtype": torch.bfloat16, "master_weights": "remainder", "state_dtype": torch.int8}
    for params, names in run_on_ranks(2, trained, options):
        assert all(param.dtype is torch.bfloat16 and bool(param.isfinite().all()) for param in params)
        assert {"exp_avg_scale", "exp_avg_sq_scale"} <= names


def test_its_own_step_is_close_to_the_kernels(run_on_ranks: RunOnRanks) -> None:
    own, kernel = (run_on_ranks(2, trained, {"stage": 2, "fused": fused})[0][0] for fused in (False, True))
    for one, other in zip(own, kernel, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def house() -> torch.optim.Optimizer:
    return House([nn.Parameter(torch.zeros(3))])


def test_before_and_after() -> None:
    assert rule_for(house()) is None
    rule = HouseRule()
    with registered(rule):
        assert rule_for(house()) is rule
        assert "House" in rules.fused_optimizers()
        register_rule(House, HouseRule())  # the same once more
        assert rule_for(type("Sub", (House,), {})([nn.Parameter(torch.zeros(3))])) is None


def test_refuses_another_rule_for_a_class_that_has_one() -> None:
    with registered(HouseRule()), pytest.raises(ConfigError, match="House has another rule already, HouseRule"):
        register_rule(House, FusedRule(ops.lion))
    with pytest.raises(ConfigError, match="AdamW has another rule already"):
        register_rule(torch.optim.AdamW, FusedRule(ops.lion))


@pytest.mark.parametrize("cls", [house(), "House", nn.Linear, None])
def test_refuses_what_is_no_class_of_optimizers(cls: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected cls to be a class of torch\.optim\.Optimizer, got"):
        register_rule(cls, HouseRule())


def test_refuses_what_is_no_rule() -> None:
    with pytest.raises(ConfigError, match="expected the rule of House to be a FusedRule, got"):
        register_rule(House, ops.adamw)  # type: ignore[arg-type]
    assert rule_for(house()) is None


def test_refuses_a_kernel_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="to have one of the kernels adamw, .*, got 'adafactor'"):
        register_rule(House, FusedRule(replace(ops.adamw, name="adafactor")))
    with pytest.raises(ConfigError, match=r"the kernel lion .*, with states \('exp_avg',\), got states \('average',\)"):
        register_rule(House, FusedRule(replace(ops.lion, states=("average",))))
    assert rule_for(house()) is None


def test_an_option_that_is_missing_is_named() -> None:
    with pytest.raises(
        ConfigError, match="to have 'lr', which the kernel lion needs, got betas, decay, eps, params, rate"
    ):
        FusedRule(ops.lion).hyper_row(house().param_groups[0])
