"""What was left out of gradients is looked at before anything of it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zeroopt import CheckpointError
from zeroopt.checkpoint.wrapped.residuals import check_residuals

PIECE = {"weight": {"start": 3, "values": torch.ones(4, dtype=torch.bfloat16)}}


def test_what_is_saved_passes() -> None:
    check_residuals({}, "residual-0.pt")
    check_residuals({"rounding": 3, "left_out": PIECE, "model": PIECE}, "residual-0.pt")


@pytest.mark.parametrize("what", ["left_out", "model"])
@pytest.mark.parametrize(
    "saved",
    [
        [1],
        {"a": 3},
        {"a": {"start": 0}},
        {"a": {"start": "0", "values": torch.ones(1)}},
        {"a": {"start": -1, "values": torch.ones(1)}},
        {"a": {"start": 0, "values": torch.ones(1, 1)}},
        {"a": {"start": 0, "values": [1.0]}},
    ],
    ids=str,
)
def test_other_things_are_refused(saved: Any, what: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"residual-0\.pt does not hold what a rank keeps for itself, but {what}"
    ):
        check_residuals({what: saved}, "residual-0.pt")


def test_neither_is_a_list() -> None:
    with pytest.raises(CheckpointError, match="does not hold"):
        check_residuals([1], "residual-0.pt")
