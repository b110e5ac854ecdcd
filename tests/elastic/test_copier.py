"""What is copied at once, what later, and what not again."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from checkpoints import train, wrapped
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.elastic import Guard, copier


def copied_shapes(memory: Path) -> list[list[list[int]]]:
    """The shapes of what is copied at once in each of four steps of a model with a frozen layer and a buffer."""
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 1), nn.BatchNorm1d(1))
    net[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = zeroopt.wrap(net, optimizer)
    shapes: list[list[list[int]]] = []
    at_once = [True]

    def note(target: Tensor, source: Tensor) -> None:
        if at_once[0]:
            shapes[-1].append(list(source.shape))

    with patch.object(copier, "copy_into", note):
        guard = Guard(model, optimizer, job="job", memory=memory)
        start = guard._copying.start

        def start_later(work: Any) -> None:
            at_once[0] = False
            start(work)
            guard.wait()
            at_once[0] = True

        guard._copying.start = start_later  # type: ignore[method-assign]
        for step in range(4):
            shapes.append([])
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            if step == 3:
                model.module[0].weight.mul_(2)
            guard.step(step + 1)
    guard.close()
    return shapes


def test_frozen_parameters_are_copied_once_to_each_slot(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    (shapes,) = run_on_ranks(1, copied_shapes, tmp_path)
    frozen = [64, 64]
    assert [frozen in at_once for at_once in shapes] == [True, True, False, True]
    assert all([1] in at_once for at_once in shapes), "running statistics"


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
