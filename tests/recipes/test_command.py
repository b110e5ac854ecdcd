"""A recipe, called as a newcomer does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from paths import ROOT
from worker_pool import WORKER_ENVIRONMENT, RunOnRanks

from recipes.command import process_group, rate_at

pytest.importorskip("tokenizers")


@pytest.mark.slow
def test_by_itself_it_trains_by_both_methods_and_compares(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.generate", "--steps=8", f"--out={tmp_path}"]
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Losses agree" in done.stdout
    outcomes = json.loads((tmp_path / "results.json").read_text())["launches"][0]["outcomes"]
    assert list(outcomes) == ["ddp", "zeroopt"]
    assert all(len(outcome["losses"]["text"]) == 8 for outcome in outcomes.values())


def test_the_rate_goes_up_and_then_down() -> None:
    rates = [rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) == rates[10]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert rate_at(0, 1) == pytest.approx(1.0)


def train_within_a_group() -> bool:
    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}), process_group(threads=1) as device:
        assert device.type == "cpu"
    return dist.is_initialized()


def test_a_process_group_that_is_there_stays(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, train_within_a_group) == [True, True]
