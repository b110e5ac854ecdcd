"""The random number generators of a process, taken down and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from zeroopt.checkpoint import RandomState
from zeroopt.checkpoint.format.plain import check_plain


def draw() -> list[Any]:
    return [torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


def test_all_generators_go_on_from_where_they_were() -> None:
    state = RandomState()
    draw()  # of each pair of normal numbers, the second is kept for the next call
    saved = state.state_dict()
    check_plain(saved, "random")
    expected = [draw(), draw()]
    state.load_state_dict(saved)
    assert [draw(), draw()] == expected
