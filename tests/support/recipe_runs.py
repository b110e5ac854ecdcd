"""Recipes on the ranks of a test, by both methods."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from recipes.outcome import Outcome, differences
from recipes.side_by_side import FIRST_TOLERANCE, LAST_TOLERANCE


def run_recipe(recipe: str, method: str, out: Path, *options: str) -> Outcome:
    """What a rank does."""
    script = importlib.import_module(f"recipes.{recipe}.__main__")
    args = script.parser().parse_args([f"--method={method}", f"--out={out}", *options])
    outcome: Outcome = script.train(args, torch.device("cpu"))
    return outcome


def check(ddp: Outcome, zeroopt: Outcome, *, goes_on: bool = False) -> None:
    """Both have learned, and the same.

    Args:
        goes_on: whether they have begun from what each had come to by itself.
    """
    for outcome in (ddp, zeroopt):
        assert outcome.learned, [str(figure) for figure in outcome.figures]
    first, last = differences(ddp, zeroopt)
    assert first <= (LAST_TOLERANCE if goes_on else FIRST_TOLERANCE)
    assert last <= LAST_TOLERANCE
