"""One process without a process group, as in a notebook."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroopt
import zeroopt.checkpoint


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))


def backward(model: nn.Module, number: int, scaler: Any = None) -> None:
    loss = model(torch.randn(4, 6, generator=torch.Generator().manual_seed(number))).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


def train(options: dict[str, Any] | None, folder: Path) -> list[Tensor]:
    """What a loop does under zeroopt, or plainly."""
    net = build()
    model: Any = net
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.01)
    if options is not None:
        model, optimizer = zeroopt.wrap(net, optimizer, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(3):
        backward(model, number, scaler)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    values = []
    if options is not None:
        with model.no_sync():
            backward(model, 3)
        with model.join():
            backward(model, 4)
        values = [optimizer.grad_norm.clone(), optimizer.clip_grad_norm_(0.1)]
    else:
        backward(model, 3)
        backward(model, 4)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        values = [norm, norm]
    optimizer.step()
    optimizer.zero_grad()
    if options is not None:
        optimizer.consolidate_state_dict()
        whole = optimizer.full_state_dict()
        zeroopt.checkpoint.save(folder / "one", model, optimizer, {"step": 4})
        zeroopt.checkpoint.async_save(folder / "two", model, optimizer).result()
        saved = optimizer.state_dict()
        with torch.no_grad():
            next(net.parameters()).zero_()
        assert zeroopt.checkpoint.load(folder / "one", model, optimizer, {"step": 0})["step"] == 4
        zeroopt.checkpoint.load(folder / "two", model, optimizer)
        optimizer.load_state_dict(saved)
        optimizer.load_state_dict(whole)
    backward(model, 5)
    optimizer.step()
    return [*values, *(value.detach().clone() for value in net.state_dict().values())]


@pytest.mark.parametrize(
    "options",
    [
        {"stage": 0},
        {"stage": 1, "average_every": 2, "transport": "pairwise"},
        {"stage": 2, "check_every": 1},
        {"stage": 2, "share_parameters": True, "transport": "shm", "sync_module_states": False},
    ],
    ids=str,
)
def test_a_process_alone_trains_as_with_the_plain_optimizer(options: dict[str, Any], tmp_path: Path) -> None:
    assert not dist.is_initialized()
    expected = train(None, tmp_path)
    got = train({**options, "fused": False}, tmp_path)
    torch.testing.assert_close([value.float() for value in got], [value.float() for value in expected])
    assert not dist.is_initialized(), "no default process group as a side effect"


def test_wrong_numbers_are_found() -> None:
    net = build()
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), check_every=1)
    model(torch.full((2, 6), torch.inf)).sum().backward()
    with pytest.raises(zeroopt.NonFiniteError, match="rank 0"):
        optimizer.step()


def test_one_of_several_processes_needs_a_group() -> None:
    net = build()
    with patch.dict(os.environ, WORLD_SIZE="2"), pytest.raises(zeroopt.StateError, match="init_process_group"):
        zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1))
