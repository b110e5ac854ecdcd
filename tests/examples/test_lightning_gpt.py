"""The script for Lightning that a user starts from."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
from lightning_runs import as_by_torchrun
from paths import ROOT
from worker_pool import RunOnRanks

pytest.importorskip("lightning")

EXAMPLES = str(ROOT / "examples")


def train(checkpoints: Path, strategy: str, epochs: int) -> dict[str, float]:
    with patch.object(sys, "path", [EXAMPLES, *sys.path]), as_by_torchrun():
        import lightning_gpt as example

        options = {"strategy": strategy, "epochs": epochs, "checkpoints": checkpoints, "ranks": 2}
        return example.train(Namespace(context=16, windows=32, batch=4, seed=0, **options))


def test_it_goes_on_and_so_does_ddp(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    first = run_on_ranks(2, train, tmp_path, "zeroopt_stage_2", 2)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
    second = run_on_ranks(2, train, tmp_path, "ddp", 4)[0]
    assert second["validation_loss"] < first["validation_loss"] - 0.05
    assert "epoch=3.ckpt" in {path.name for path in tmp_path.iterdir()}
