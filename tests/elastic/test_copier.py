"""What is copied at once, and what later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import train, wrapped
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.elastic import Guard

WIDTH = 5000


class Hidden(nn.Module):
    """What changes in it besides what steps change, torch keeps no count of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(1, WIDTH), nn.BatchNorm1d(WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))
        self.key = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).sin().mean()


def hidden(memory: Path) -> Any:
    torch.manual_seed(0)
    net = Hidden()
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1))
    return net, model, optimizer, Guard(model, optimizer, job="job", memory=memory)


def what_comes_back(memory: Path) -> Any:
    """All of a model after three steps, and of another one that goes on from the copy."""
    net, model, optimizer, guard = hidden(memory)
    for step in range(1, 4):
        model(torch.randn(4, 1)).backward()
        optimizer.step()
        for kept in (net.average, net.key):
            kept.data.mul_(0.5).add_(step)
        guard.step(step)
    guard.wait()
    other, *_, other_guard = hidden(memory)
    other_guard.restore()
    return net.state_dict(), other.state_dict()


def test_changes_of_which_torch_keeps_no_count_are_copied(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    ((expected, found),) = run_on_ranks(1, what_comes_back, tmp_path)
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def trained_and_changed(memory: Path) -> Any:
    """A step of the optimizer does not change what is still being copied."""
    model, optimizer = wrapped("mlp", "adamw", {})
    guard = Guard(model, optimizer, job="job", memory=memory)
    finished = []
    for step in range(3):
        train(model, optimizer, "mlp", range(step, step + 1))
        finished.append(guard._copying.future is None)
        guard.step(step + 1)
    guard.close()
    return finished


def test_a_step_waits_for_the_copy(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert run_on_ranks(2, trained_and_changed, tmp_path) == [[True] * 3] * 2
