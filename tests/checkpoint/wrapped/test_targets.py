"""State is found again whatever it is called and of whatever dtype it is, and that of parameters which nobody steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import Recipe, assert_same, whole_state, wrap_all
from op_cases import OPS
from torch import nn
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt import ops

KINDS = ("array", "number", "scalar", "half")


class Scaled(torch.optim.Optimizer):
    """Has a state of a name as those of scales of 8-bit moments are."""

    def __init__(self, params: Any, kind: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.kind = kind

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["grad"] = torch.zeros_like(param, dtype=torch.int32)
                    state["grad_scale"] = {
                        "array": torch.zeros_like(param),
                        "half": torch.zeros_like(param, dtype=torch.bfloat16),
                        "scalar": torch.zeros(()),
                        "number": 0.0,
                    }[self.kind]
                state["grad"] += 1
                state["grad_scale"] += param.grad.to(torch.bfloat16) if self.kind in ("array", "half") else 1
                param.sub_(param.grad * state["grad_scale"], alpha=group["lr"])


def net_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 40), nn.Linear(40, 9)).to(dtype)


def scaled(kind: str) -> Recipe:
    def recipe() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = net_of()
        return net, [Scaled(net.parameters(), kind)]

    return recipe


def bfloat16() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """A model of the user's in 16 bits, of which torch's optimizers keep state in 16 bits."""
    net = net_of(torch.bfloat16)
    return net, [torch.optim.AdamW(net.parameters(), lr=0.01)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, 7, dtype=next(model.parameters()).dtype)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def dtypes(optimizer: zeroopt.ZeroOptimizer) -> set[tuple[str, Any]]:
    return {(n, getattr(v, "dtype", type(v))) for entry in optimizer.state.values() for n, v in entry.items()}


def go_on(path: Path) -> None:
    for number, recipe in enumerate([*map(scaled, KINDS), bfloat16]):
        model, (optimizer,) = wrap_all(recipe, bucket_mb=0.0005, fused=False)
        for _ in range(2):
            step(model, optimizer)
        zeroopt.checkpoint.save(path / str(number), model, optimizer)
        again, (its_optimizer,) = wrap_all(recipe, bucket_mb=0.001, fused=False)
        zeroopt.checkpoint.load(path / str(number), again, its_optimizer)
        assert_same(whole_state(its_optimizer), whole_state(optimizer))
        step(model, optimizer)
        step(again, its_optimizer)
        assert_same(whole_state(its_optimizer), whole_state(optimizer))
        assert_same([p.detach() for p in again.parameters()], [p.detach() for p in model.parameters()])
        assert dtypes(its_optimizer) == dtypes(optimizer)


def test_state_of_any_name_and_dtype(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, go_on, tmp_path)


def test_all_moments_that_may_have_scales_are_known() -> None:
    assert {name for op in OPS.values() for name in op.states} == set(ops.MOMENTS)


def freeze_late(path: Path) -> None:
    """State of a parameter that was frozen before wrapping."""

    def recipe() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = net_of()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        step(net, optimizer)
        net[0].requires_grad_(False)
        return net, [optimizer]

    model, (optimizer,) = wrap_all(recipe)
    step(model, optimizer)
    zeroopt.checkpoint.save(path, model, optimizer)
    expected = whole_state(optimizer)
    assert len(expected["state"]) == 4
    again, (its_optimizer,) = wrap_all(recipe)
    for entry in its_optimizer.state_dicts.idle_state().values():
        entry["exp_avg"].fill_(5.0)
    zeroopt.checkpoint.load(path, again, its_optimizer)
    assert_same(whole_state(its_optimizer), expected)


def test_state_of_frozen_parameters(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, freeze_late, tmp_path / "x")
