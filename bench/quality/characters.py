"""A text of 16 characters with random but fixed habits, and a small language model that learns them."""

from __future__ import annotations

import bisect
import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

CHARACTERS = 16
CONTEXT = 6
WIDTH = 128
TRAINING, VALIDATION = 50_000, 4_000
UNTRAINED = math.log(CHARACTERS)


class LanguageModel(nn.Module):
    """Embeddings of the last characters, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 32)
        self.first = nn.Linear(32 * CONTEXT, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        x = functional.gelu(self.norm(self.first(self.embed(text).flatten(1))))
        logits: Tensor = self.out(x + functional.gelu(self.second(x)))
        return logits


@cache
def windows() -> Tensor:
    """All pieces of CONTEXT + 1 characters: [TRAINING + VALIDATION, CONTEXT + 1]. Each character depends on the two before it."""
    generator = torch.Generator().manual_seed(0)
    habits = torch.randn(CHARACTERS, CHARACTERS, CHARACTERS, generator=generator) * 2.5
    cumulative = habits.softmax(-1).cumsum(-1).tolist()
    text = [0, 1]
    for chance in torch.rand(TRAINING + VALIDATION + CONTEXT - 2, generator=generator).tolist():
        following = bisect.bisect(cumulative[text[-2]][text[-1]], chance)
        text.append(min(following, CHARACTERS - 1))
    return torch.tensor(text).unfold(0, CONTEXT + 1, 1)
