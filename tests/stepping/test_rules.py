"""Which optimizers have a fused kernel, and how their options reach it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import ALL_CLASSES, TORCH_CLASSES
from torch import Tensor, nn

from zeroopt.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLAMB, FusedLion, FusedRMSprop, FusedSGD
from zeroopt.stepping.rules import FusedRule, fused_optimizers, rule_for

TORCH = list(TORCH_CLASSES)
OWN = ALL_CLASSES
PAIRS = list(TORCH_CLASSES.items())


def build(cls: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = cls([nn.Parameter(torch.zeros(3))], **options)
    return optimizer


def rule(cls: Any, **options: Any) -> tuple[FusedRule, dict[str, Any]]:
    """The rule and the only group of such an optimizer."""
    optimizer = build(cls, **options)
    found = rule_for(optimizer)
    assert found is not None
    return found, optimizer.param_groups[0]


def names(cls: Any, **options: Any) -> tuple[str, ...]:
    found, group = rule(cls, **options)
    return found.names_in_use(group)


def row(cls: Any, **options: Any) -> list[float]:
    found, group = rule(cls, **options)
    return found.hyper_row(group)


class TestRuleFor:
    @pytest.mark.parametrize("cls", [*TORCH, *OWN])
    def test_there_is_one(self, cls: Any) -> None:
        found, group = rule(cls)
        assert len(found.hyper_row(group)) == len(found.kernel.columns)

    @pytest.mark.parametrize(("theirs", "ours"), PAIRS)
    def test_our_class_has_the_kernel_of_torchs(self, theirs: Any, ours: Any) -> None:
        assert rule(ours)[0].kernel is rule(theirs)[0].kernel
        assert row(ours) == row(theirs)

    @pytest.mark.parametrize("cls", [*TORCH, *OWN])
    def test_a_subclass_has_none(self, cls: Any) -> None:
        """It may step otherwise."""
        assert rule_for(build(type("Mine", (cls,), {}))) is None

    def test_a_subclass_may_bring_its_own(self) -> None:
        mine = type("Mine", (torch.optim.SGD,), {"fused_rule": FusedSGD.fused_rule})
        assert rule_for(build(mine)) is FusedSGD.fused_rule

    @pytest.mark.parametrize("cls", [torch.optim.Adadelta, torch.optim.NAdam, torch.optim.Adamax, torch.optim.Rprop])
    def test_other_optimizers_have_none(self, cls: Any) -> None:
        assert rule_for(build(cls)) is None

    @pytest.mark.parametrize("cls", TORCH)
    def test_differentiable_has_none(self, cls: Any) -> None:
        assert rule_for(build(cls, differentiable=True)) is None

    def test_one_differentiable_group_suffices(self) -> None:
        optimizer = build(torch.optim.AdamW)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "differentiable": True})
        assert rule_for(optimizer) is None

    def test_they_are_listed(self) -> None:
        assert fused_optimizers() == [cls.__name__ for cls in TORCH]


class TestNamesInUse:
    @pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam, FusedAdamW, FusedAdam])
    def test_adam(self, cls: Any) -> None:
        assert names(cls) == ("exp_avg", "exp_avg_sq")
        assert names(cls, amsgrad=True) == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    @pytest.mark.parametrize("cls", [torch.optim.SGD, FusedSGD])
    def test_sgd(self, cls: Any) -> None:
        assert names(cls) == ()
        assert names(cls, momentum=0.9) == ("momentum_buffer",)

    @pytest.mark.parametrize("cls", [torch.optim.RMSprop, FusedRMSprop])
    def test_rmsprop(self, cls: Any) -> None:
        assert names(cls) == ("square_avg",)
        assert names(cls, momentum=0.9) == ("square_avg", "momentum_buffer")
        assert names(cls, centered=True) == ("square_avg", "grad_avg")
        assert names(cls, momentum=0.9, centered=True) == ("square_avg", "momentum_buffer", "grad_avg")

    @pytest.mark.parametrize(
        ("cls", "expected"),
        [
            (FusedAdagrad, ("sum",)),
            (FusedLion, ("exp_avg",)),
            (FusedLAMB, ("exp_avg", "exp_avg_sq")),
        ],
    )
    def test_those_without_choice(self, cls: Any, expected: tuple[str, ...]) -> None:
        assert names(cls) == expected

    @pytest.mark.parametrize("cls", TORCH)
    def test_they_are_the_keys_of_torchs_state(self, cls: Any) -> None:
        options: dict[str, Any] = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        optimizer = build(cls, **options)
        param = optimizer.param_groups[0]["params"][0]
        param.grad = torch.ones(3)
        optimizer.step()
        found = rule_for(optimizer)
        assert found is not None
        expected = (("step",) if found.has_step else ()) + found.names_in_use(optimizer.param_groups[0])
        assert set(optimizer.state[param]) == set(expected)


class TestHyperRow:
    """In the order that `zeroopt.ops` documents."""

    @pytest.mark.parametrize("cls", [torch.optim.AdamW, FusedAdamW])
    def test_adamw(self, cls: Any) -> None:
        assert row(cls) == [1e-3, 0.9, 0.999, 1e-8, 0.01, 1, 0, 0]
        options = {"lr": 0.5, "betas": (0.1, 0.2), "eps": 0.3, "weight_decay": 0.4, "amsgrad": True, "maximize": True}
        assert row(cls, **options) == [0.5, 0.1, 0.2, 0.3, 0.4, 1, 1, 1]

    @pytest.mark.parametrize("cls", [torch.optim.Adam, FusedAdam])
    def test_adam(self, cls: Any) -> None:
        assert row(cls, weight_decay=0.4) == [1e-3, 0.9, 0.999, 1e-8, 0.4, 0, 0, 0]

    def test_a_group_says_whether_its_decay_is_decoupled(self) -> None:
        """In torch releases where AdamW is an Adam with that option."""
        found, group = rule(torch.optim.Adam)
        assert found.hyper_row({**group, "decoupled_weight_decay": True})[5] == 1
        assert found.hyper_row({k: v for k, v in group.items() if k != "decoupled_weight_decay"})[5] == 0

    @pytest.mark.parametrize("cls", [torch.optim.SGD, FusedSGD])
    def test_sgd(self, cls: Any) -> None:
        assert row(cls, lr=0.5, momentum=0.1, dampening=0.2, weight_decay=0.3) == [0.5, 0.1, 0.2, 0.3, 0, 0]
        assert row(cls, lr=0.5, momentum=0.1, nesterov=True, maximize=True) == [0.5, 0.1, 0, 0, 1, 1]

    @pytest.mark.parametrize("cls", [torch.optim.Adagrad, FusedAdagrad])
    def test_adagrad(self, cls: Any) -> None:
        options = {"lr": 0.5, "lr_decay": 0.1, "weight_decay": 0.2, "eps": 0.3, "maximize": True}
        assert row(cls, **options) == [0.5, 0.1, 0.2, 0.3, 1]

    @pytest.mark.parametrize("cls", [torch.optim.Adagrad, FusedAdagrad])
    def test_adagrads_state_starts_where_its_group_says(self, cls: Any) -> None:
        found, group = rule(cls, initial_accumulator_value=0.25)
        assert found.initial_value(group) == 0.25

    @pytest.mark.parametrize("cls", [torch.optim.RMSprop, FusedRMSprop])
    def test_rmsprop(self, cls: Any) -> None:
        options = {"lr": 0.5, "alpha": 0.1, "eps": 0.2, "weight_decay": 0.3, "momentum": 0.4, "maximize": True}
        assert row(cls, **options) == [0.5, 0.1, 0.2, 0.3, 0.4, 0, 1]
        assert row(cls, centered=True) == [1e-2, 0.99, 1e-8, 0, 0, 1, 0]

    def test_lion_and_lamb(self) -> None:
        options = {"lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.4, "maximize": True}
        assert row(FusedLion, **options) == [0.5, 0.1, 0.2, 0.4, 1]
        assert row(FusedLAMB, **options, eps=0.3) == [0.5, 0.1, 0.2, 0.3, 0.4, 1]

    @pytest.mark.parametrize("cls", [torch.optim.AdamW, FusedAdamW])
    def test_tensors_become_numbers(self, cls: Any) -> None:
        lr: Tensor = torch.tensor([0.5])
        found, group = rule(cls)
        values = found.hyper_row({**group, "lr": lr, "betas": (torch.tensor([[0.25]]), torch.tensor(0.75))})
        assert values[:3] == [0.5, 0.25, 0.75]
        assert all(type(value) is float for value in values)
