"""How large a model, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.method import BFLOAT16, SAME_BITS
from recipes.see_and_read.model import CoCa
from recipes.see_and_read.scenes import LENGTH, WORDS
from recipes.vit import ViT


@dataclass(frozen=True)
class Preset:
    """A model, and how it is trained.

    Called, it gives the model, and what it is called with on one rank, as `python -m zeroopt estimate --model` wants them.

    Attributes:
        image_layers, image_width, image_heads: of the tower for pictures.
        layers, width, heads: of the tower for captions alone; there are as many layers that look at pictures.
        vocabulary, length: of captions. Those of digits need few.
        size: of a picture, in pixels.
        patch: side of the squares that it is cut into, in pixels.
        batch: pairs of a step, on all ranks together.
        rank_batch: of a rank, in estimates.
        convolved: whether several convolutions look at patches, see `ViT`.
        bfloat16: whether parameters are bfloat16; of those that a rank steps, 16 bits more complete each to its float32.
        recomputed: whether activations are computed once more in backward, rather than kept.
    """

    image_layers: int
    image_width: int
    image_heads: int
    layers: int
    width: int
    heads: int
    size: int
    patch: int
    batch: int
    steps: int
    rate: float
    vocabulary: int = 64_000
    length: int = 64
    rank_batch: int = 32
    convolved: bool = False
    bfloat16: bool = False
    recomputed: bool = False

    def make(self) -> CoCa:
        picture = ViT(
            self.size,
            self.patch,
            self.image_layers,
            self.image_width,
            self.image_heads,
            convolved=self.convolved,
            recomputed=self.recomputed,
        )
        return CoCa(
            picture, self.vocabulary, self.length, self.layers, self.width, self.heads, recomputed=self.recomputed
        )

    def options(self) -> dict[str, Any]:
        """Of `zeroopt.wrap`."""
        return BFLOAT16 if self.bfloat16 else SAME_BITS

    def __call__(self) -> tuple[CoCa, tuple[Tensor, Tensor]]:
        pictures = torch.zeros(self.rank_batch, 1, self.size, self.size)
        return self.make(), (pictures, torch.ones(self.rank_batch, self.length, dtype=torch.long))


TINY = Preset(
    2, 64, 4, 1, 64, 4, 20, 4, batch=64, steps=800, rate=3e-3, vocabulary=len(WORDS), length=LENGTH, convolved=True
)
COCA_BASE = Preset(12, 768, 12, 12, 768, 12, 288, 18, batch=65_536, steps=500_000, rate=8e-4, bfloat16=True)
COCA_LARGE = Preset(
    24, 1024, 16, 12, 1024, 16, 288, 18, batch=65_536, steps=500_000, rate=8e-4, bfloat16=True, recomputed=True
)
COCA_2B = Preset(
    40, 1408, 16, 18, 1408, 16, 288, 18, batch=65_536, steps=500_000, rate=8e-4, bfloat16=True, recomputed=True
)

PRESETS = {"tiny": TINY, "coca-base": COCA_BASE, "coca-large": COCA_LARGE, "coca-2b": COCA_2B}
