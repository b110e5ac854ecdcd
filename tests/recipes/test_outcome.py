"""What a training has come to, and how two are compared."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from outcomes import make_outcome

from recipes.outcome import Figure, differences


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    outcome = make_outcome()
    outcome.write(tmp_path / "new" / "outcome.json")
    assert outcome.read(tmp_path / "new" / "outcome.json") == outcome


@pytest.mark.parametrize(
    ("value", "higher_is_better", "learned"), [(1.0, False, True), (1.0, True, False), (2.0, False, False)]
)
def test_learned_is_better_than_the_reference(value: float, higher_is_better: bool, learned: bool) -> None:
    figure = Figure("loss", value, 2.0, higher_is_better=higher_is_better)
    assert figure.learned is learned
    assert make_outcome(figures=[figure]).learned is learned


def test_no_number_is_not_learned() -> None:
    assert not Figure("loss", math.nan, 2.0).learned


def test_differences_are_shares_of_the_first_losses_and_of_the_last() -> None:
    ddp = make_outcome(losses={"text": [4.0] * 10 + [2.0] * 10})
    assert differences(ddp, ddp) == (0.0, 0.0)
    other = replace(ddp, losses={"text": [4.0] * 9 + [4.004] + [2.02] * 10})
    assert differences(ddp, other) == pytest.approx((0.001, 0.01), rel=0.02)


def test_losses_that_are_no_numbers_or_of_other_phases_are_far_apart() -> None:
    ddp = make_outcome(losses={"text": [1.0, 1.0]})
    assert differences(ddp, replace(ddp, losses={"text": [1.0, math.nan]})) == (math.inf, math.inf)
    assert differences(ddp, replace(ddp, losses={"images": [1.0, 1.0]})) == (math.inf, math.inf)
