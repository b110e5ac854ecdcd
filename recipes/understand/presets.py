"""Sizes of an encoder, and how each is trained.

python -m zeroopt estimate --model recipes.understand.presets:BERT_LARGE --world-size 64 --device cuda --option param_dtype=bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.method import BFLOAT16, SAME_BITS
from recipes.understand.masking import count_missing
from recipes.understand.model import Encoder, MaskedWords


@dataclass(frozen=True)
class Preset:
    """A size.

    Attributes:
        context: words of a window, and of a text that has a label.
        batch: windows a step of pre-training, of all ranks together.
        missing: the share of words that are missing.
        labels: texts of each domain that have one.
        draws: how many times labels are drawn anew, of which accuracies are means.
        label_steps, label_batch: of fine-tuning, the latter of all ranks together.
        label_lr: of fine-tuning.
        bfloat16: whether parameters are bfloat16; of those that a rank steps, 16 bits more complete each to its float32.
    """

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    batch: int
    steps: int
    lr: float
    missing: float
    labels: int
    draws: int
    label_steps: int
    label_batch: int
    label_lr: float
    bfloat16: bool = False

    def make_encoder(self) -> Encoder:
        return Encoder(self.vocabulary, self.context, self.layers, self.width, self.heads)

    def __call__(self) -> tuple[MaskedWords, tuple[Tensor, Tensor, Tensor]]:
        """For `python -m zeroopt estimate --model`: the model, and what it is called with on a rank with one window."""
        tokens = torch.zeros(1, self.context, dtype=torch.long)
        places = torch.zeros(1, count_missing(self.missing, self.context), dtype=torch.long)
        return MaskedWords(self.make_encoder()), (tokens, places, places)

    def options(self) -> dict[str, Any]:
        """Of `zeroopt.wrap`."""
        return BFLOAT16 if self.bfloat16 else SAME_BITS


def bert(layers: int, width: int, heads: int) -> Preset:
    """As the paper trains it, but for a batch that many numbers of ranks divide."""
    return Preset(
        *(layers, width, heads),
        context=512,
        vocabulary=30_522,
        batch=240,
        steps=1_000_000,
        lr=1e-4,
        missing=0.15,
        labels=8,
        draws=3,
        label_steps=200,
        label_batch=48,
        label_lr=3e-5,
        bfloat16=True,
    )


TINY = Preset(
    *(1, 64, 4),
    context=32,
    vocabulary=2048,
    batch=96,
    steps=1000,
    lr=6e-3,
    missing=0.3,
    labels=8,
    draws=3,
    label_steps=60,
    label_batch=48,
    label_lr=1e-2,
)
BERT_BASE, BERT_LARGE = bert(12, 768, 12), bert(24, 1024, 16)

PRESETS = {"tiny": TINY, "base": BERT_BASE, "large": BERT_LARGE}
