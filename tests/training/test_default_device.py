"""Scripts that set torch's default device: what zeroopt makes for itself lies where it says, and not where that is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors
from training import batch, build, loss_of, optimizer_for, snapshot
from worker_pool import RunOnRanks

import zeroopt

ROOT = Path(zeroopt.__file__).parent
OPTIONS: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "clipped": {"stage": 1, "max_grad_norm": 0.1, "check_every": 1},
    "pairs": {"stage": 2, "transport": "pairwise", "param_dtype": torch.bfloat16, "cast_inputs": True},
    "rounds": {"stage": 2, "transport": "tree"},
    "own step": {"stage": 2, "fused": False},
}


def train(options: dict[str, Any], device: str) -> tuple[list[torch.Tensor], Any]:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd_momentum", net, groups=2), **options)
    for step in range(3):
        inputs = batch("mlp", step)
        with torch.device(device):
            loss_of(model(inputs)).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.device(device):
        optimizer.consolidate_state_dict(to=0)
        state = optimizer.full_state_dict() if torch.distributed.get_rank() == 0 else None
        optimizer.load_state_dict(optimizer.state_dict())
        return snapshot(net), state


def train_with_both(options: dict[str, Any]) -> None:
    (expected, expected_state), (got, state) = train(options, "cpu"), train(options, "meta")
    for mine, other in zip(got, expected, strict=True):
        assert mine.device == other.device
        assert torch.equal(mine, other)
    if state is not None:
        torch.testing.assert_close(state["state"], expected_state["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_training_is_the_same(run_on_ranks: RunOnRanks, name: str) -> None:
    run_on_ranks(2, train_with_both, OPTIONS[name])


def silent_about_device(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of torch that make a tensor wherever the default is, but for one that asks where that is."""
    makers = {maker.__name__ for maker in _device_constructors()}
    asked = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "device"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in asked and ast.unparse(node.func).startswith("torch."):
            named = {keyword.arg for keyword in node.keywords}
            if ast.unparse(node.func).removeprefix("torch.") in makers and not named & {"device", None}:
                yield node


def test_whatever_is_made_says_where() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted(ROOT.rglob("*.py"))
        for call in silent_about_device(ast.parse(path.read_text()))
    ]
    assert silent == []
