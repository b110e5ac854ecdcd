"""Sizes of a GPT, and how each is trained.

python -m zeroopt estimate --model recipes.generate.presets:GPT_17B --world-size 256 --device cuda --option param_dtype=bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.generate.model import GPT
from recipes.method import BFLOAT16


@dataclass(frozen=True)
class Preset:
    """A size.

    Attributes:
        batch: sequences a step, of all ranks together.
        steps, answer_steps: of training on text, and of fine-tuning on answers.
        bfloat16: whether parameters are bfloat16; of those that a rank steps, 16 bits more complete each to its float32.
        recomputed: whether activations are computed once more rather than kept.
        built_by_wrap: whether no rank is to hold the model before it is wrapped.
    """

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    batch: int
    steps: int
    answer_steps: int
    lr: float
    bfloat16: bool = False
    recomputed: bool = False
    built_by_wrap: bool = False

    def make(self) -> GPT:
        return GPT(self.vocabulary, self.context, self.layers, self.width, self.heads, recomputed=self.recomputed)

    def __call__(self) -> tuple[GPT, tuple[Tensor, Tensor]]:
        """For `python -m zeroopt estimate --model`: the model, and what it is called with on a rank with one sequence."""
        tokens = torch.zeros(1, self.context, dtype=torch.long)
        return self.make(), (tokens, tokens)

    def options(self) -> dict[str, Any]:
        """Of `zeroopt.wrap`."""
        return BFLOAT16 if self.bfloat16 else {}


GPT_1M = Preset(4, 128, 4, 64, 2048, batch=32, steps=160, answer_steps=60, lr=3e-3)
GPT_3M = Preset(6, 192, 6, 128, 2048, batch=16, steps=600, answer_steps=200, lr=2e-3)
GPT_124M = Preset(12, 768, 12, 1024, 50_304, batch=512, steps=20_000, answer_steps=500, lr=6e-4, bfloat16=True)
GPT_1_5B = Preset(
    48, 1600, 25, 1024, 50_304, batch=512, steps=100_000, answer_steps=500, lr=2e-4, bfloat16=True, recomputed=True
)
GPT_17B = Preset(
    78,
    4256,
    28,
    1024,
    50_304,
    batch=512,
    steps=300_000,
    answer_steps=500,
    lr=1.5e-4,
    bfloat16=True,
    recomputed=True,
    built_by_wrap=True,
)

PRESETS = {"1m": GPT_1M, "3m": GPT_3M, "124m": GPT_124M, "1.5b": GPT_1_5B, "17b": GPT_17B}
