"""Both methods in turn: what is started, shown, written, and thought of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest
from outcomes import make_outcome

from recipes import side_by_side
from recipes.outcome import Outcome
from recipes.side_by_side import Launch, TrainingFailed, compare

pytest.importorskip("matplotlib")

LAUNCHES = (Launch("first", 2), Launch("second", 3))


def compare_made(made: dict[str, Outcome | Exception], out: Path) -> int:
    """With these outcomes, rather than trainings."""

    def start(recipe: str, arguments: object, method: str, launch: Launch, scratch: Path) -> Outcome:
        outcome = made[method]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with patch.object(side_by_side, "start", start):
        return compare("generate", ["--steps", "2"], list(made), LAUNCHES, out)


def test_a_good_comparison_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_made({"ddp": make_outcome(method="ddp"), "zeroopt": make_outcome()}, tmp_path) == 0
    shown = capsys.readouterr().out
    for part in ("generate first", "generate second", "(untrained)", "asked", "zeroopt learned", "Losses agree"):
        assert part in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"] == "python -m recipes.generate --steps 2"
    assert [launch["title"] for launch in results["launches"]] == ["first", "second"]
    assert (tmp_path / "comparison.png").stat().st_size > 0


@pytest.mark.parametrize("losses", [[3.0, 2.5], [3.1, 2.0], [3.0, math.nan]])
def test_losses_that_part_are_told(losses: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_made({"ddp": make_outcome(), "zeroopt": make_outcome(losses={"text": losses})}, tmp_path) == 1
    assert "Losses DISAGREE" in capsys.readouterr().out


def test_what_was_not_learned_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (figure,) = make_outcome().figures
    worse = make_outcome(figures=[type(figure)(figure.name, figure.reference, figure.value)])
    assert compare_made({"zeroopt": worse}, tmp_path) == 1
    assert "has NOT learned" in capsys.readouterr().out


def test_a_training_that_failed_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_made({"ddp": TrainingFailed("DDP ended with status 1")}, tmp_path) == 1
    assert "DDP ended with status 1" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
