"""Captions from a trained model."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.see_and_read.model import CoCa
from recipes.see_and_read.scenes import BEGIN, END


@torch.no_grad()
def write(model: CoCa, pictures: Tensor, length: int) -> Tensor:
    """(pictures, length) tokens: after each the likeliest one."""
    patches = model.picture(pictures)
    tokens = torch.full((len(pictures), 1), BEGIN, device=pictures.device)
    while tokens.shape[1] < length:
        following = model.write(model.read(tokens), patches)[:, -1].argmax(1, keepdim=True)
        tokens = torch.cat([tokens, following.masked_fill(tokens[:, -1:] == END, END)], dim=1)
    return tokens
