"""The example for Accelerate."""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from paths import ROOT
from worker_pool import RunOnRanks

pytest.importorskip("accelerate")

from accelerators import as_started

EXAMPLES = str(ROOT / "examples")


def run(folder: Path, steps: int, method: str = "zeroopt") -> list[str]:
    """The lines that the example prints on this rank."""
    with patch.object(sys, "path", [EXAMPLES, *sys.path]), as_started(), redirect_stdout(io.StringIO()) as printed:
        import accelerate_gpt as example

        example.train(
            Namespace(folder=folder, method=method, steps=steps, every=4, stage=2, context=16, batch=2, seed=0)
        )
    return [
        line for line in printed.getvalue().splitlines() if line.startswith(("step ", "going on "))
    ]  # not warnings of others


def test_it_trains_like_ddp_and_goes_on(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected, _ = run_on_ranks(2, run, tmp_path / "ddp", 6, "ddp")
    first, _ = run_on_ranks(2, run, tmp_path / "zeroopt", 6)
    assert first == expected
    second, _ = run_on_ranks(2, run, tmp_path / "zeroopt", 8)
    assert second[:3] == ["going on from step 4", *first[4:6]]
    other, *_ = run_on_ranks(3, run, tmp_path / "zeroopt", 9)
    assert other[0] == "going on from step 8" and len(other) == 2
    assert (tmp_path / "zeroopt" / "model" / "model.safetensors").is_file()
