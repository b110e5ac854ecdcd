"""How large a trunk, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.many_tasks.model import ManyHeads
from recipes.method import BFLOAT16, SAME_BITS
from recipes.vit import ViT


@dataclass(frozen=True)
class Preset:
    """A trunk, and how it and its heads are trained.

    Called, it gives the model, and what it is called with on one rank, as `python -m zeroopt estimate --model` wants them.

    Attributes:
        size: of a picture, in pixels.
        patch: side of the squares that it is cut into, in pixels.
        rank_batch: pictures of a rank in a step, all of one task.
        rate: learning rate of the trunk at its highest.
        head_rate: of the heads.
        convolved: whether several convolutions look at patches, see `ViT`.
        bfloat16: whether parameters are bfloat16; of those that a rank steps, 16 bits more complete each to its float32.
        recomputed: whether activations are computed once more in backward, rather than kept.
    """

    layers: int
    width: int
    heads: int
    size: int
    patch: int
    rank_batch: int
    steps: int
    rate: float
    head_rate: float
    convolved: bool = False
    bfloat16: bool = False
    recomputed: bool = False

    def make(self) -> ManyHeads:
        trunk = ViT(
            self.size,
            self.patch,
            self.layers,
            self.width,
            self.heads,
            convolved=self.convolved,
            recomputed=self.recomputed,
        )
        return ManyHeads(trunk, self.size, self.patch)

    def options(self) -> dict[str, Any]:
        """Of `zeroopt.wrap`."""
        return BFLOAT16 if self.bfloat16 else SAME_BITS

    def __call__(self) -> tuple[ManyHeads, tuple[Tensor, str]]:
        return self.make(), (torch.zeros(self.rank_batch, 1, self.size, self.size), "restore")


TINY = Preset(2, 64, 4, 16, 4, rank_batch=32, steps=600, rate=2e-3, head_rate=4e-3, convolved=True)
VIT_B = Preset(12, 768, 12, 224, 16, rank_batch=64, steps=100_000, rate=3e-4, head_rate=1e-3, bfloat16=True)
VIT_L = Preset(24, 1024, 16, 224, 16, rank_batch=64, steps=100_000, rate=2e-4, head_rate=1e-3, bfloat16=True)
VIT_H = Preset(
    32, 1280, 16, 224, 14, rank_batch=64, steps=100_000, rate=1e-4, head_rate=1e-3, bfloat16=True, recomputed=True
)
VIT_G = Preset(
    48, 1664, 16, 224, 14, rank_batch=64, steps=100_000, rate=1e-4, head_rate=1e-3, bfloat16=True, recomputed=True
)

PRESETS = {"tiny": TINY, "vit-b": VIT_B, "vit-l": VIT_L, "vit-h": VIT_H, "vit-g": VIT_G}
