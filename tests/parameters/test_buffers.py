"""Buffers follow those of rank 0, in training and in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from follow import Prepare, follow, inputs, sgd, values, with_ddp
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=0.5), nn.ReLU(), nn.Linear(16, 1))


def two_forwards(prepare: Prepare) -> list[Tensor]:
    """A GAN's loop: the second forward must not spoil what the backward of the first one needs."""
    results = []
    for mode in (True, False):
        net = normed()
        model, optimizer = prepare(net, sgd(net))
        for step in range(3):
            model.train(mode)
            (model(inputs(step, 4, 8)) - model(inputs(step + 50, 4, 8))).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.train()
            model(inputs(step + 100, 4, 8)).mean().backward()  # statistics part for the next forward
            optimizer.zero_grad()
        results += values(net)
    return results


def evaluations(prepare: Prepare) -> list[Tensor]:
    """What a validation computes after training, after accumulating and after an update that was made to buffers by hand."""
    net = normed()
    model, optimizer = prepare(net, sgd(net))
    outputs = []

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            outputs.extend(model(inputs(step, 4, 8)) for step in (70, 71))
        model.train()

    for step in range(3):
        if step == 1:
            with model.no_sync():  # type: ignore[operator]
                model(inputs(step + 30, 4, 8)).mean().backward()
        model(inputs(step, 4, 8)).mean().backward()
        if step == 2:
            validate()
        optimizer.step()
        optimizer.zero_grad()
        validate()
    outputs += [buffer.double() for buffer in net.buffers()]
    net.load_state_dict({name: torch.full_like(value, 2) for name, value in net.state_dict().items()})
    validate()
    model.eval()
    with model.no_sync():  # type: ignore[operator]
        outputs.append(model(inputs(80, 4, 8)).detach())
    return outputs


def follow_ddp(scenario: Any, options: dict[str, Any]) -> None:
    follow(scenario, with_ddp(), **options)


@pytest.mark.parametrize("scenario", [two_forwards, evaluations])
@pytest.mark.parametrize("options", [{}, {"transport": "pairwise"}], ids=str)
def test_buffers_are_those_of_ddp(run_on_ranks: RunOnRanks, scenario: Any, options: dict[str, Any]) -> None:
    run_on_ranks(2, follow_ddp, scenario, options)


def evaluate_alone(rank: int) -> list[float]:
    """One rank validates while the others wait for it; the outputs of all, which the others compute afterwards."""
    net = normed()
    model, optimizer = zeroopt.wrap(net, sgd(net))
    for step in range(2):
        model(inputs(step, 4, 8)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    outputs = []
    for turn in (rank, 1 - rank):
        if dist.get_rank() == turn:
            with torch.inference_mode():
                outputs += model(torch.ones(1, 8)).flatten().tolist()
        dist.barrier()
    model.train()
    model(inputs(9, 4, 8)).mean().backward()
    optimizer.step()
    return outputs + [value.sum().item() for value in values(net)]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_may_evaluate_alone(run_on_ranks: RunOnRanks, rank: int) -> None:
    first, second = run_on_ranks(2, evaluate_alone, rank)
    assert first == second


def take_part_without_data() -> list[Tensor]:
    """Rank 1 has no batch in the last step; buffers follow within the context as outside of it."""
    net = normed()
    model, optimizer = zeroopt.wrap(net, sgd(net))
    with model.join():
        for step in range(2 - dist.get_rank()):
            model(inputs(step, 4, 8)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return [model(torch.ones(1, 8)), *values(net), *net.buffers()]


def test_buffers_follow_a_rank_that_still_trains(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, take_part_without_data)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
