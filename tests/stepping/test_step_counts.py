"""Step counts beyond 2^24 are saved, loaded and moved as they are, though a float32 shows but the nearest that it can be."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import CheckpointError, RankMismatchError, StateError, checkpoint
from zeroopt.optim import FusedAdamW
from zeroopt.stepping.step_counts import (
    MOST_EXACT,
    as_float32,
    count_of,
    problem_with_count,
    put_count,
    show_count,
    with_exact_counts,
)

FAR = MOST_EXACT + 3  # no float32
FARTHER = 2**40 + 12345


@pytest.mark.parametrize("count", [0, 1, MOST_EXACT - 1, MOST_EXACT, FAR, FARTHER])
def test_a_count_that_is_shown_can_be_found(count: int) -> None:
    steps = torch.zeros(2, 3)
    put_count(steps, 1, count)
    shown = show_count(steps, 1)
    assert shown.dtype is torch.float32 and shown.dim() == 0 and shown == torch.tensor(float(count))
    assert count_of(shown) == count
    entry = with_exact_counts({"a": {"step": shown, "other": 1}})["a"]
    assert float(entry["step"]) == count and entry["other"] == 1
    assert entry["step"].dtype is (torch.float64 if count > MOST_EXACT else torch.float32)
    assert (entry["step"] is shown) == (count <= MOST_EXACT)


def test_what_somebody_writes_in_its_place_counts() -> None:
    steps = torch.zeros(2, 1)
    put_count(steps, 0, FARTHER)
    shown = show_count(steps, 0)
    for count in (7, MOST_EXACT - 1):
        shown.fill_(float(count))
        assert count_of(shown) == count
        assert with_exact_counts({"a": {"step": shown}})["a"]["step"] is shown


def test_counts_of_others_are_what_they_say() -> None:
    assert count_of(torch.tensor(5.0)) == count_of(5) == 5
    entry = {"step": torch.tensor(float(FAR), dtype=torch.float64)}
    assert with_exact_counts({0: entry, 1: {}})[0] is entry


def test_the_rest_of_what_is_cast_for_torch_can_be_found() -> None:
    cast = as_float32(torch.tensor(float(FAR), dtype=torch.float64), torch.device("cpu"))
    assert cast.dtype is torch.float32 and count_of(cast) == FAR


def far_on(**options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter that has taken so many steps."""
    param = nn.Parameter(torch.ones(5))
    optimizer = FusedAdamW([param], **options)
    step_with(param, optimizer)
    state = optimizer.state_dict()
    state["state"][0]["step"] = torch.tensor(float(FAR - 1), dtype=torch.float64)
    optimizer.load_state_dict(state)
    step_with(param, optimizer)
    return param, optimizer


def step_with(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch.arange(5.0)
    optimizer.step()


def saved_count(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.state_dict()["state"][0]["step"])


def reloaded(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Another one that has loaded what was saved in a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = FusedAdamW([nn.Parameter(torch.ones(5))])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("go_on", [lambda same: same, reloaded, deepcopy], ids=["itself", "reloaded", "copied"])
def test_an_optimizer_counts_on(go_on: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> None:
    optimizer = go_on(far_on()[1])
    assert saved_count(optimizer) == FAR
    for steps in range(1, 4):
        step_with(optimizer.param_groups[0]["params"][0], optimizer)
        assert saved_count(optimizer) == FAR + steps


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_torch_loads_what_was_saved_and_steps(how: dict[str, bool]) -> None:
    saved = far_on()[1].state_dict()
    param = nn.Parameter(torch.ones(5))
    plain = torch.optim.AdamW([param], **how)
    saved["param_groups"][0].update({"foreach": None, "fused": None, **how})
    plain.load_state_dict(saved)
    step_with(param, plain)
    assert abs(saved_count(plain) - FAR) <= 1


def counts_of_wrapped(stage: int, folder: str) -> list[list[float]]:
    """Of both parameters after each of what keeps them: a list for each."""

    def made(count: float | None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight.requires_grad_(False)
        net[1].bias.requires_grad_(False)
        model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=stage)
        train(model, optimizer)
        if count is not None:
            optimizer.consolidate_state_dict(to=0)
            state = [optimizer.full_state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(state)
            for entry in state[0]["state"].values():
                entry["step"] = torch.tensor(count, dtype=torch.float64)
            optimizer.load_state_dict(state[0])
            train(model, optimizer)
        return model, optimizer

    def train(model: nn.Module, optimizer: Any) -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def counts(optimizer: Any) -> list[float]:
        steps: list[Tensor] = [entry["step"] for entry in optimizer.state_dict()["state"].values() if "step" in entry]
        return [count_of(step) for step in steps]

    model, optimizer = made(float(FAR - 1))
    found = [counts(optimizer)]
    checkpoint.save(Path(folder) / "a", model, optimizer)
    again, other = made(None)
    checkpoint.load(Path(folder) / "a", again, other)
    found.append(counts(other))
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, optimizer.state_dict())
    again, other = made(None)
    other.load_state_dict(shards)
    train(again, other)
    found.append([count - 1 for count in counts(other)])
    for param in model.module[1].parameters():  # which are taken in, for which state moves
        param.requires_grad_(True)
    train(model, optimizer)
    found.append([count - 1 for count in counts(optimizer) if count > 2])
    plain = zeroopt.unwrap(model, optimizer)[1]
    found.append([count_of(entry["step"]) - 1 for entry in plain.state.values() if count_of(entry["step"]) > 2])
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_count_on_through_whatever_keeps_or_moves_their_state(run_on_ranks: RunOnRanks, stage: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for of_rank in run_on_ranks(2, counts_of_wrapped, stage, folder):
            assert all(counts and set(counts) == {FAR} for counts in of_rank), of_rank


NO_COUNTS = [
    (float("nan"), "nan"),
    (torch.tensor(float("-inf")), "-inf"),
    (-1, "-1"),
    (torch.tensor([2.5]), "2.5"),
    (torch.ones(2), "a tensor of shape [2]"),
    (torch.ones(5), "a tensor of shape [5]"),
    (torch.ones((), dtype=torch.complex64), "(1+0j)"),
    ("3", "'3'"),
    (None, "None"),
]


@pytest.mark.parametrize(
    "count",
    [
        *(0, 7.0, np.int64(3), np.float32(3.0)),
        *(torch.tensor(3), torch.tensor([3.0]), torch.tensor(2.0**40), torch.ones((), device="meta")),
    ],
)
def test_counts(count: Any) -> None:
    assert problem_with_count(count) is None


@pytest.mark.parametrize(("count", "told"), NO_COUNTS, ids=[told for _, told in NO_COUNTS])
def test_what_is_no_count_is_refused_before_anything_is_changed(count: Any, told: str) -> None:
    param, optimizer = far_on()
    before = deepcopy(optimizer.state_dict())
    damaged = deepcopy(before)
    damaged["state"][0]["step"] = count
    with pytest.raises(
        StateError, match=re.escape(f"has, as the step count of parameter '0', {told}: expected a whole number")
    ):
        optimizer.load_state_dict(damaged)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    optimizer.state[param]["step"] = count
    with pytest.raises(
        StateError, match=re.escape(f"FusedAdamW has, as the step count of parameter '0', {told}: expected")
    ):
        zeroopt.wrap(nn.ParameterList([param]), optimizer)


def refusals(folder: str) -> list[str]:
    """What loading says where one rank is given what is no count, or a checkpoint has it; all is as before."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    before = [deepcopy(optimizer.state_dict()["state"]), [param.detach().clone() for param in net.parameters()]]

    def refused(load: Callable[[], object]) -> str:
        with pytest.raises((StateError, RankMismatchError, CheckpointError)) as raised:
            load()
        found = [optimizer.state_dict()["state"], list(net.parameters())]
        torch.testing.assert_close(found, before, rtol=0, atol=0)
        return f"{type(raised.value).__name__}: {raised.value}"

    mine = deepcopy(optimizer.state_dict())
    if dist.get_rank() == 1:
        first = min(position for position, entry in mine["state"].items() if entry)
        mine["state"][first]["step"] = torch.tensor(float("nan"))
    told = [refused(lambda: optimizer.load_state_dict(mine))]
    shown = [entry["step"] for entry in optimizer.state.values() if "step" in entry]
    for step in shown:
        step.fill_(-1)
    checkpoint.save(Path(folder) / "a", model, optimizer)
    for step in shown:
        step.fill_(1)
    return [*told, refused(lambda: checkpoint.load(Path(folder) / "a", model, optimizer))]


def test_all_ranks_refuse_what_is_no_count_on_one_of_them(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for told in run_on_ranks(2, refusals, str(tmp_path)):
        assert "the step count of parameter" in told[0] and ", nan: expected a whole number" in told[0]
        assert "the step count of parameter" in told[1] and ", -1.0: expected a whole number" in told[1]
