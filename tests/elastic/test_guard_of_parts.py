"""Copies in memory of models whose parts are on different ranks: tensor parallelism, and pipeline stages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_all_same, assert_same
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.elastic import Guard

if not hasattr(pytest.importorskip("torch.distributed.tensor"), "DTensor"):
    pytest.skip("needs torch 2.5", allow_module_level=True)

from tests.checkpoint.wrapped.test_parts import (
    everything,
    make_split,
    make_stages,
    mesh_of,
    step_stage,
    train_split,
)
from tests.elastic.test_neighbours import on_host
from tests.training.test_pipeline import Front

OPTIONS: list[dict[str, Any]] = [
    {"stage": 0, "fused": False},
    {"param_dtype": torch.bfloat16, "master_weights": "remainder"},
]


def split(memory: Path, sizes: dict[str, int] | None, steps: int) -> Any:
    """What there was before so many steps, and is behind them, of models over a mesh with a "tp" dimension, or without one."""
    mesh, found = mesh_of(sizes), []
    for number, options in enumerate(OPTIONS):
        net, model, optimizer = make_split(mesh, "tensor", options)
        guard = Guard(model, optimizer, {"epoch": number}, job=f"job-{number}", memory=memory)
        extra = guard.restore()
        before = everything(net, optimizer)
        first = extra.get("step", 0)
        for step in range(first, first + steps):
            train_split(model, optimizer, range(step, step + 1))
            guard.step(step + 1)
        guard.wait()
        found.append((extra, before, everything(net, optimizer)))
    return found


def test_tensor_parallelism_goes_on_at_any_mesh(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    trained, *_ = run_on_ranks(4, split, tmp_path, {"dp": 2, "tp": 2}, 2)
    for world_size, sizes in ((4, {"dp": 1, "tp": 4}), (1, None)):
        for models in run_on_ranks(world_size, split, tmp_path, sizes, 0):
            for number, ((extra, before, _), (_, _, expected)) in enumerate(zip(models, trained, strict=True)):
                assert extra == {"epoch": number, "step": 2}
                assert_same(before, expected)


def stages(root: Path, steps: int) -> Any:
    """Likewise of pipeline stages, each rank on a host of its own."""
    stage, model, optimizer = make_stages("different")
    guard = on_host(root, model, optimizer)
    first = guard.restore().get("step", 0)
    before = everything(stage, optimizer), optimizer.param_groups[0]["lr"]
    for step in range(first, first + steps):
        step_stage(stage, model, optimizer, step)
        optimizer.param_groups[0]["lr"] *= 0.5 if isinstance(stage, Front) else 0.25
        guard.step(step + 1)
    guard.wait()
    guard._sending.wait()
    return first, before, (everything(stage, optimizer), optimizer.param_groups[0]["lr"])


def test_pipeline_stages_outlive_a_host(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = run_on_ranks(4, stages, tmp_path / "whole", 3)
    trained = run_on_ranks(4, stages, tmp_path / "cut", 2)
    shutil.rmtree(tmp_path / "cut" / "host-3")
    replaced = run_on_ranks(4, stages, tmp_path / "cut", 1)
    assert [first for first, *_ in replaced] == [2] * 4
    for (_, before, after), (_, _, left), (_, _, end) in zip(replaced, trained, expected, strict=True):
        assert_same(before, left)
        assert_same(after, end)


def refused(memory: Path) -> list[str]:
    errors = []
    for names, frozen in (("different", False), ("alike", True)):
        _, model, optimizer = make_stages(names)
        with pytest.raises((zeroopt.NotSupportedError, zeroopt.CheckpointError)) as raised:
            Guard(model, optimizer, job="job", memory=memory, frozen=frozen)
        errors.append(str(raised.value))
    return errors


def test_what_parts_cannot_do_is_refused_at_once(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    found = run_on_ranks(4, refused, tmp_path)
    assert_all_same(found, found[0])
    assert "leave it at True" in found[0][0]
    assert "begin with rank 0 and with rank 2 both have '0.weight'" in found[0][1]
    assert list(tmp_path.iterdir()) == []
