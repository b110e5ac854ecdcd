"""What an optimizer's own step takes for itself is what it takes when it really steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zeroopt.planner.estimator import config_of
from zeroopt.planner.live_bytes import LiveBytes
from zeroopt.planner.own_step import own_step_bytes
from zeroopt.planner.rehearsal import Cluster, Rehearsal, find_trainees

SIDE = 64
SIZE = SIDE * SIDE * 4


def planned(cls: Any, device: str = "cpu", options: dict[str, Any] | None = None, **arguments: Any) -> int:
    net = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(3)))
    optimizer = cls(net.parameters(), lr=0.1, **arguments)
    config = config_of({"stage": 2, "fused": False, **(options or {})})
    rehearsal = Rehearsal(find_trainees(net, optimizer), config, Cluster(1, 1, device))
    return own_step_bytes(rehearsal, optimizer, config, device)


def really_taken(cls: Any, **arguments: Any) -> int:
    param = nn.Parameter(torch.ones(SIDE * SIDE))
    optimizer = cls([param], lr=0.1, **arguments)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        known = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
        with LiveBytes([param, param.grad, *known]) as live:
            optimizer.step()
    return live.most


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adadelta, torch.optim.RAdam])
def test_it_is_what_a_step_takes(cls: Any) -> None:
    assert planned(cls) == pytest.approx(really_taken(cls, foreach=False), abs=1024)


def test_tensors_that_are_stepped_together_take_it_together() -> None:
    one = planned(torch.optim.Adadelta)
    assert one >= SIZE
    assert planned(torch.optim.Adadelta, device="cuda") == 3 * one
    assert planned(torch.optim.Adadelta, foreach=True) >= 3 * SIZE
    assert planned(torch.optim.Adadelta, device="cuda", foreach=False) == one


def test_kernels_take_nothing() -> None:
    assert planned(torch.optim.AdamW, options={"fused": "auto"}) == 0


def test_gradients_are_widened_for_a_step_in_float32() -> None:
    assert planned(torch.optim.SGD, options={"stage": 0, "param_dtype": torch.bfloat16}) >= 3 * SIZE
