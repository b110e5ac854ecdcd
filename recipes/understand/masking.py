"""Which words are missing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recipes.text import MASK_ID

# Of the missing words: by MASK, and by any word. Others stay, and are to be told all the same.
REPLACED, RANDOM = 0.8, 0.1


class Masked(NamedTuple):
    """Tokens [batch, length], and what is missing where, [batch, missing] each."""

    tokens: Tensor
    places: Tensor
    missing: Tensor


def count_missing(share: float, length: int) -> int:
    """As many words of each row, so that a mean over ranks is one over all words."""
    return max(1, round(share * length))


def mask(tokens: Tensor, share: float, vocabulary: int, generator: torch.Generator) -> Masked:
    """
    Args:
        share: of all words that goes missing.
    """
    batch, length = tokens.shape
    count = count_missing(share, length)
    places = torch.rand(batch, length, generator=generator).topk(count, dim=1).indices
    missing = tokens.gather(1, places)
    fate = torch.rand(batch, count, generator=generator)
    drawn = torch.randint(vocabulary, (batch, count), generator=generator)
    put = torch.where(fate < REPLACED, MASK_ID, torch.where(fate < REPLACED + RANDOM, drawn, missing))
    return Masked(tokens.scatter(1, places, put), places, missing)
