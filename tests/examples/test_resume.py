"""The scripts that a user starts from."""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

from paths import ROOT
from worker_pool import RunOnRanks

EXAMPLES = str(ROOT / "examples")


def resume(checkpoints: Path, steps: int, stage: int) -> list[str]:
    """The lines that the example prints on this rank."""
    with patch.object(sys, "path", [EXAMPLES, *sys.path]), redirect_stdout(io.StringIO()) as printed:
        import resume as example

        example.train(
            Namespace(checkpoints=checkpoints, steps=steps, every=5, stage=stage, context=32, batch=12, seed=0)
        )
    return printed.getvalue().splitlines()


def test_resume_goes_on_as_if_it_had_not_stopped(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    checkpoints = tmp_path / "runs"
    first = run_on_ranks(2, resume, checkpoints, 7, 2)[0]
    assert [line.split("  ")[0] for line in first] == [f"step {number}" for number in range(1, 8)]
    second = run_on_ranks(2, resume, checkpoints, 10, 2)[0]
    assert second[0] == "going on from step 5"
    assert second[1:3] == first[5:7], "the steps behind the checkpoint, taken twice"
    other = run_on_ranks(3, resume, checkpoints, 11, 1)[0]
    assert other[0] == "going on from step 10"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-10", "step-5"]
