"""Outcomes of trainings that have not been."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipes.outcome import Figure, Outcome


def make_outcome(**changes: Any) -> Outcome:
    outcome = Outcome(
        method="zeroopt",
        preset="1m",
        world_size=2,
        device="CPU",
        parameters=1000,
        losses={"text": [3.0, 2.0]},
        step_ms=12.0,
        peak_bytes=2_000_000,
        held_bytes=1_000_000,
        figures=[Figure("validation loss", 2.0, 3.0)],
        texts={"asked": "answered"},
    )
    return replace(outcome, **changes)
