"""The example for transformers' Trainer."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
from paths import ROOT
from worker_pool import RunOnRanks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerators import as_started

EXAMPLES = str(ROOT / "examples")


def run(folder: Path, steps: int, method: str = "zeroopt") -> dict[int, float]:
    """The losses of its steps."""
    with patch.object(sys, "path", [EXAMPLES, *sys.path]), as_started():
        import trainer_gpt as example

        log = example.train(
            Namespace(folder=folder, method=method, steps=steps, every=4, stage=2, context=16, batch=2, seed=0)
        )
    return {int(entry["step"]): entry["loss"] for entry in log if "loss" in entry}


def test_it_trains_like_ddp_and_goes_on(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = run_on_ranks(2, run, tmp_path / "ddp", 6, "ddp")[0]
    first = run_on_ranks(2, run, tmp_path / "zeroopt", 6)[0]
    assert first == pytest.approx(expected, rel=1e-5)
    (tmp_path / "zeroopt" / "checkpoint-6").rename(tmp_path / "aside")
    second = run_on_ranks(2, run, tmp_path / "zeroopt", 8)[0]
    assert {step: second[step] for step in first} == first, "from step 4 on taken twice"
    other = run_on_ranks(3, run, tmp_path / "zeroopt", 9)[0]
    assert list(other) == list(range(1, 10)) and {step: other[step] for step in second} == second
    assert (tmp_path / "zeroopt" / "model" / "model.safetensors").is_file()
