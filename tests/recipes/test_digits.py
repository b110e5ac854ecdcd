"""Digits on their canvases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recipes.digits import CLASSES, load_digits, place

CORNER = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])  # light at the left above


def placed(*, scale: float = 1.0, x: float = 0.0, y: float = 0.0, angle: float = 0.0, size: int = 2) -> Tensor:
    values = {"scale": scale, "x": x, "y": y, "angle": angle}
    return place(CORNER, size, **{name: torch.tensor([value]) for name, value in values.items()})[0, 0]


def test_an_image_that_fills_its_canvas_is_as_it_was() -> None:
    assert torch.allclose(placed(), CORNER[0, 0], atol=1e-6)


def test_a_quarter_turn_is_clockwise() -> None:
    assert torch.allclose(placed(angle=math.pi / 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), atol=1e-6)


def test_an_image_lies_where_it_was_placed() -> None:
    right_below = placed(scale=0.5, x=0.5, y=0.5, size=4)
    assert torch.allclose(right_below[2:, 2:], CORNER[0, 0], atol=1e-6)
    assert right_below.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_digits_to_test_with_are_others() -> None:
    pytest.importorskip("sklearn")
    training, test = load_digits()
    assert len(training) + len(test) == 1797 and len(test) == 359
    assert training.images.shape[1:] == (1, 8, 8) and training.images.min() == 0 and training.images.max() == 1
    assert set(test.labels.tolist()) == set(range(CLASSES))
