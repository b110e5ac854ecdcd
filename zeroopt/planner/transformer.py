"""A transformer of so many parameters, to estimate with before there is a model."""

from __future__ import annotations

from math import gcd, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_HEAD_WIDTH = 128


class Transformer(nn.Module):
    """Decoder only, pre-norm, four times the width within a block, an output that is not tied to the embedding. Maps tokens to the
    mean cross-entropy of those that follow.

    Args:
        checkpointed: blocks keep their input alone, and go through their forward again in backward.
    """

    def __init__(self, layers: int, width: int, vocabulary: int, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // gcd(width, _HEAD_WIDTH)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


def transformer_of(
    parameters: float,
    layers: int | None = None,
    width: int | None = None,
    vocabulary: int = 50_304,
    *,
    checkpointed: bool = False,
) -> Transformer:
    """One on the meta device that comes near so many parameters.

    Args:
        layers, width: one of them, or both, which then say how many parameters there are. None: as many layers as a model of that
            size has usually, a width of 128 for each.
    """
    if layers is None:
        layers = _layers_for(parameters, width, vocabulary)
    width = width or _width_for(parameters, layers, vocabulary)
    with torch.device("meta"):
        return Transformer(layers, width, vocabulary, checkpointed=checkpointed)


def _layers_for(parameters: float, width: int | None, vocabulary: int) -> int:
    if width is not None:
        return max(1, round((parameters - 2 * vocabulary * width) / (12 * width**2)))
    return min(
        range(1, 1000),
        key=lambda n: abs(12 * n * (_HEAD_WIDTH * n) ** 2 + 2 * vocabulary * _HEAD_WIDTH * n - parameters),
    )


def _width_for(parameters: float, layers: int, vocabulary: int) -> int:
    """A multiple of the width of a head, or of half of it where that is much."""
    width = (sqrt(vocabulary**2 + 12 * layers * parameters) - vocabulary) / (12 * layers)
    unit = _HEAD_WIDTH if width > 16 * _HEAD_WIDTH else _HEAD_WIDTH // 2
    return max(unit, round(width / unit) * unit)
