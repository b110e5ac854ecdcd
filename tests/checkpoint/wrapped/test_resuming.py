"""Going on from the newest checkpoint, if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import all_of, assert_same, train, wrapped
from worker_pool import RunOnRanks

import zeroopt.checkpoint
from zeroopt.data import GlobalBatchSampler


def parts() -> tuple[Any, Any, GlobalBatchSampler]:
    model, optimizer = wrapped("mlp", "adamw", {})
    return model, optimizer, GlobalBatchSampler(64, 8)


def start_and_go_on(root: Path) -> list[Any]:
    """What the first start, and those after it, find."""
    found = []
    for start in range(3):
        model, optimizer, sampler = parts()
        random = {"random": zeroopt.checkpoint.RandomState()}
        extra = {"sampler": sampler}
        first = zeroopt.checkpoint.resume(root, model, optimizer, extra, rank_extra=random).get("step", 0)
        found.append((first, sampler.position, torch.rand(1).item()))
        train(model, optimizer, "mlp", range(first, first + 2))
        sampler.step()
        before = all_of(model, [optimizer])
        zeroopt.checkpoint.save(
            root / f"step-{first + 2}", model, optimizer, {**extra, "step": first + 2}, rank_extra=random, keep=2
        )
        expected = torch.rand(1).item()
        torch.manual_seed(start)
        model, optimizer, _ = parts()
        zeroopt.checkpoint.resume(root, model, optimizer, rank_extra=random)
        assert_same(all_of(model, [optimizer]), before)
        assert torch.rand(1).item() == expected
    return found


def test_a_run_starts_and_goes_on_by_the_same_call(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    everyone = run_on_ranks(2, start_and_go_on, tmp_path)
    for found in everyone:
        assert [(step, position) for step, position, _ in found] == [(0, 0), (2, 8), (4, 16)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-6"]


def two_jobs(root: Path) -> list[str]:
    model, optimizer, _ = parts()
    other, its_optimizer, _ = parts()
    for step in range(3):
        zeroopt.checkpoint.save(root / f"a-{step}", model, optimizer, keep=1)
        zeroopt.checkpoint.save(root / f"b-{step}", other, its_optimizer, keep=2)
    again, optimizer, _ = parts()
    zeroopt.checkpoint.resume(root, again, optimizer, names="a-*")
    zeroopt.checkpoint.save(root / "a-3", again, optimizer, keep=1)
    return sorted(path.name for path in root.iterdir())


def test_each_job_keeps_its_own_checkpoints(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert run_on_ranks(1, two_jobs, tmp_path) == [["a-3", "b-1", "b-2"]]


def other_number(root: Path) -> tuple[int, bool]:
    model, optimizer, sampler = parts()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    random = {"random": zeroopt.checkpoint.RandomState()}
    zeroopt.checkpoint.resume(root, model, optimizer, {"sampler": sampler}, rank_extra=random)
    return sampler.position, torch.equal(torch.get_rng_state(), before)


def test_another_number_of_ranks_keeps_its_random_numbers(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, start_and_go_on, tmp_path)
    assert run_on_ranks(1, other_number, tmp_path) == [(24, True)]


def with_damage(root: Path) -> None:
    root.write_text("a file")
    model, optimizer, _ = parts()
    zeroopt.checkpoint.resume(root, model, optimizer)


def test_a_directory_that_cannot_be_read_is_an_error_on_all_ranks(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    errors: list[Any] = run_on_ranks.outcomes(2, with_damage, tmp_path / "file")
    for error in errors:
        assert error.type_name == "CheckpointError" and "on rank 0: cannot look for checkpoints" in error.message
