"""A block of a transformer, for text and for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron of four times the width: [batch, length, width] to the same.

    Args:
        causal: whether a place sees only those before it.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen`: true where a place may be looked at, [batch, 1, 1, length]; None: all may."""
        x = x + self.attend(self.attention_norm(x), seen)
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x

    def attend(self, x: Tensor, seen: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=self.causal)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Blocks(nn.ModuleList):
    """Blocks, one after the other.

    Args:
        recomputed: whether each keeps its input alone, and runs once more in backward for the rest (arXiv 1604.06174).
    """

    def __init__(self, layers: int, width: int, heads: int, *, causal: bool, recomputed: bool = False) -> None:
        super().__init__(Block(width, heads, causal=causal) for _ in range(layers))
        self.recomputed = recomputed

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        for block in self:
            if self.recomputed and torch.is_grad_enabled():
                x = checkpoint(block, x, seen, use_reentrant=False)
            else:
                x = block(x, seen)
        return x


def draw_weights(module: nn.Module) -> None:
    """Values at the beginning, of one module and not of its parts: normal, with a variance of a third of 1 / width (arXiv 2201.11990)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=(3 * module.weight.shape[-1]) ** -0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
