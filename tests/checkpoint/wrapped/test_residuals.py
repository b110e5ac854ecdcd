"""What was left out of gradients is looked at before anything of it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt import CheckpointError
from zeroopt.checkpoint import RandomState
from zeroopt.checkpoint.wrapped.residuals import checked_residuals

PIECE = {"weight": {"start": 3, "values": torch.ones(4, dtype=torch.bfloat16)}}


@pytest.mark.parametrize(
    "saved",
    [{}, {"rounding": 3, "left_out": PIECE, "model": PIECE}, {"rounding": 3}],
    ids=["none", "all", "nothing yet"],
)
def test_what_is_saved_passes(saved: dict[str, Any]) -> None:
    assert checked_residuals(saved, "residual-0.pt") == saved


def test_what_the_first_checkpoints_have_is_what_was_left_out() -> None:
    assert checked_residuals(PIECE, "residual-0.pt") == {"left_out": PIECE}


@pytest.mark.parametrize("what", ["left_out", "model"])
@pytest.mark.parametrize(
    "saved",
    [
        [1],
        {"a": 3},
        {"a": {"start": 0}},
        {"a": {"start": "0", "values": torch.ones(1)}},
        {"a": {"start": -1, "values": torch.ones(1)}},
        {"a": {"start": 0, "values": torch.ones(1, 1)}},
        {"a": {"start": 0, "values": [1.0]}},
    ],
    ids=str,
)
def test_other_things_are_refused(saved: Any, what: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"residual-0\.pt does not hold what a rank keeps for itself, but {what}"
    ):
        checked_residuals({what: saved}, "residual-0.pt")


def test_neither_is_a_list() -> None:
    with pytest.raises(CheckpointError, match="does not hold"):
        checked_residuals([1], "residual-0.pt")


class Chain(nn.Module):
    """Layers that are run from the first to the last, or the other way."""

    def __init__(self, *, backwards: bool) -> None:
        super().__init__()
        self.layers, self.backwards = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), backwards

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers) if self.backwards else self.layers:
            x = layer(x).tanh()
        return x


def trained_chain(*, backwards: bool) -> Any:
    torch.manual_seed(0)
    net = Chain(backwards=backwards)
    options: dict[str, Any] = {"gradient_compression": "int8", "transport": "pairwise", "bucket_mb": 0.002}
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), **options)
    for _ in range(2):
        model(torch.randn(2, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def orders_around_a_load(path: Path) -> Any:
    """Orders of buckets: before a load that fails, after it, as they were saved, and after one that does not fail."""
    model, optimizer = trained_chain(backwards=True)
    zeroopt.checkpoint.save(path / "checkpoint", model, optimizer)
    saved = [list(generation) for generation in optimizer.generations]
    model, optimizer = trained_chain(backwards=False)
    orders = [[list(generation) for generation in optimizer.generations]]
    with pytest.raises(CheckpointError, match="missing"):
        zeroopt.checkpoint.load(path / "checkpoint", model, optimizer, {"missing": RandomState()})
    orders.append([list(generation) for generation in optimizer.generations])
    zeroopt.checkpoint.load(path / "checkpoint", model, optimizer)
    return [*orders, saved, [list(generation) for generation in optimizer.generations]]


def test_a_load_that_fails_leaves_buckets_as_they_were(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for before, after_failure, saved, loaded in run_on_ranks(2, orders_around_a_load, tmp_path):
        assert before != saved
        assert (after_failure, loaded) == (before, saved)
