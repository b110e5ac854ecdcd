"""Handwritten digits, which scikit-learn ships, and pictures of them.

They are the 1,797 images of 8 by 8 pixels of https://archive.ics.uci.edu/dataset/80. All here are float32 in [0, 1], with one
channel, as (images, 1, height, width).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 10
TEST_SHARE = 5  # one of so many digits is kept for testing


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in [0, 1], and which digit each is (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, chosen: Tensor) -> Digits:
        """Some of them, (m,) numbers from 0 to n."""
        return Digits(self.images[chosen], self.labels[chosen])


@cache
def load_digits() -> tuple[Digits, Digits]:
    """Those to train with, and those to test with. The latter are the last ones: people wrote many in a row."""
    from sklearn.datasets import load_digits as load  # only here: it brings in SciPy, which takes a second

    found = load()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    begin = len(labels) - len(labels) // TEST_SHARE
    return Digits(images[:begin], labels[:begin]), Digits(images[begin:], labels[begin:])


def place(images: Tensor, size: int, *, scale: Tensor, x: Tensor, y: Tensor, angle: Tensor) -> Tensor:
    """Each image on a black canvas of its own, (n, channels, size, size).

    Args:
        images: (n, channels, height, width).
        size: of a canvas, in pixels.
        scale: (n,), height of the image as a part of the canvas's.
        x, y: (n,), of its centre, from -1 (left, top) to 1 (right, bottom).
        angle: (n,), by which it is turned clockwise, in radians.
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack(  # from the canvas back to the image, as grid_sample wants it
        [torch.stack([cos, sin, -cos * x - sin * y], 1), torch.stack([-sin, cos, sin * x - cos * y], 1)], 1
    )
    grid = F.affine_grid(rows, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def uniform(count: int, low: float, high: float, generator: torch.Generator | None = None) -> Tensor:
    """(count,) random numbers."""
    return low + (high - low) * torch.rand(count, generator=generator)
