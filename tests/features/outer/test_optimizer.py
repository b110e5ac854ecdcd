"""Which optimizers may take outer steps, and what their options come to when they are saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeroopt
from zeroopt import ConfigError, NotSupportedError
from zeroopt.features.outer.optimizer import inspect_outer, pack_options, take_options


class CountsInGroup(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"])


class KeepsRows(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for param in self.param_groups[0]["params"]:
            self.state[param]["pair"] = torch.zeros(2)


def two_groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": params}, {"params": [nn.Parameter(torch.zeros(1))]}], lr=0.1)


@pytest.mark.parametrize("made", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, zeroopt.optim.FusedLion])
def test_any_that_treats_each_element_by_itself(made: Any) -> None:
    assert inspect_outer(lambda params: made(params, lr=0.1))[0] == f"outer optimizer {made.__name__}"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda params: None, ConfigError, "to make a torch optimizer, got NoneType"),
        (two_groups, ConfigError, "one with 2 param_groups of 2 parameters for 1"),
        (lambda params: torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1.0), ConfigError, "1 parameters for 1"),
        (lambda params: zeroopt.optim.FusedLAMB(params, lr=0.1), NotSupportedError, "FusedLAMB needs whole parameters"),
        (CountsInGroup, NotSupportedError, "CountsInGroup counts its steps in the options of a param_group"),
        (lambda params: KeepsRows(params, lr=0.1), NotSupportedError, "KeepsRows keeps a Tensor as 'pair'"),
    ],
)
def test_others_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inspect_outer(make)


def test_options_are_saved_as_plain_values() -> None:
    param = nn.Parameter(torch.zeros(2))
    adam = torch.optim.Adam([param], lr=torch.tensor(0.5), betas=(0.8, 0.9))
    (packed,) = pack_options(adam)
    assert packed["lr"] == 0.5 and packed["betas"] == [0.8, 0.9] and "params" not in packed
    other = torch.optim.Adam([param], lr=torch.tensor(0.1))
    take_options(other, [packed | {"unknown": 1}])
    assert other.param_groups[0]["lr"].item() == 0.5 and other.param_groups[0]["betas"] == (0.8, 0.9)
    assert "unknown" not in other.param_groups[0]
