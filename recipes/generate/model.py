"""A GPT. Nothing in it knows how it is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.transformer import Blocks, draw_weights

IGNORED = -100  # as a target: a token that is not to be learned


class GPT(nn.Module):
    """Tokens to logits of those that follow, or with targets to the mean cross-entropy. Logits use the token embedding.

    Args:
        context: the most tokens it sees at once.
        recomputed: whether activations of blocks are computed once more in backward, rather than kept.
    """

    def __init__(
        self, vocabulary: int, context: int, layers: int, width: int, heads: int, *, recomputed: bool = False
    ) -> None:
        super().__init__()
        self.context = context
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = Blocks(layers, width, heads, causal=True, recomputed=recomputed)
        self.norm = nn.LayerNorm(width)
        self.apply(draw_weights)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """[batch, length] to [batch, length, vocabulary], or to a scalar in float32."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        logits = F.linear(self.norm(self.blocks(x)), self.token_embedding.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
