"""Plain torch loads checkpoints of zeroopt, without zeroopt, and zeroopt loads those of plain torch; both train on alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import plain_torch
import pytest
import torch
from checkpoints import assert_same
from plain_torch import STEPS_AFTER, STEPS_BEFORE
from torch import Tensor
from worker_pool import WORKER_ENVIRONMENT, RunOnRanks

import zeroopt
import zeroopt.checkpoint

pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")

Results = dict[str, dict[str, Tensor]]


def run_plain_torch(what: str, directory: Path) -> Results:
    """Both ranks of `plain_torch`, in processes that cannot import zeroopt."""
    command = [sys.executable, plain_torch.__file__, what, str(directory)]
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    results: Results = torch.load(directory / f"{what}.results", weights_only=True)
    return results


def wrap_plain(name: str, options: dict[str, Any]) -> tuple[zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
    net, optimizer = plain_torch.plain(name)
    return zeroopt.wrap(net, optimizer, bucket_mb=0.001, fused=False, **options)


def values_of(model: zeroopt.ZeroDataParallel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def save_ours(directory: Path) -> Results:
    """By optimizer, what training on gives."""
    results = {}
    for name in plain_torch.OPTIMIZERS:
        model, optimizer = wrap_plain(name, {})
        plain_torch.train(model, optimizer, 0, STEPS_BEFORE)
        zeroopt.checkpoint.save(directory / f"ours-{name}", model, optimizer, {"epoch": 1})
        plain_torch.train(model, optimizer, STEPS_BEFORE, STEPS_AFTER)
        results[name] = values_of(model)
    return results


def test_plain_torch_loads_ours(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    saved = run_on_ranks(2, save_ours, tmp_path)[0]
    results = run_plain_torch("load", tmp_path)
    assert len(results) == 4 * len(saved)
    for what, values in results.items():
        assert_same(values, saved[what.rpartition(" ")[2]], what)


def load_theirs(directory: Path, options: dict[str, Any]) -> Results:
    results = {}
    for path in sorted(p for p in directory.iterdir() if p.is_dir()):
        kind, _, name = path.name.partition("-")
        model, optimizer = wrap_plain(name, options)
        keys = {"optimizer_key": "optim"} if kind == "optim" else {}
        assert zeroopt.checkpoint.load(path, model, optimizer, **keys) == {}
        plain_torch.train(model, optimizer, STEPS_BEFORE, STEPS_AFTER)
        results[path.name] = values_of(model)
    return results


def test_we_load_theirs(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = run_plain_torch("save", tmp_path)
    assert len(expected) == 6 * len(plain_torch.OPTIMIZERS)
    for world_size, options in ((2, {}), (1, {}), (4, {"stage": 1})):
        for loaded in run_on_ranks(world_size, load_theirs, tmp_path, options):
            assert_same(loaded, expected)
