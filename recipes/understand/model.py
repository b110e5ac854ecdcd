"""An encoder in the manner of BERT (arXiv 1810.04805), and what is put on it. Nothing in it knows how it is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.transformer import Blocks, draw_weights

SMOOTHING = 0.1  # of labels


class Encoder(nn.Module):
    """Tokens to what each of them means where it stands: [batch, length] to [batch, length, width].

    Args:
        context: the longest text.
        recomputed: whether activations of blocks are computed once more in backward, rather than kept.
    """

    def __init__(
        self, vocabulary: int, context: int, layers: int, width: int, heads: int, *, recomputed: bool = False
    ) -> None:
        super().__init__()
        self.width = width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = Blocks(layers, width, heads, causal=False, recomputed=recomputed)
        self.norm = nn.LayerNorm(width)
        self.apply(draw_weights)

    def forward(self, tokens: Tensor, words: Tensor | None = None) -> Tensor:
        """`words`: true where there is one, rather than padding, [batch, length]; None: everywhere."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        out: Tensor = self.norm(self.blocks(x, None if words is None else words[:, None, None]))
        return out


class MaskedWords(nn.Module):
    """An encoder that is to tell missing words."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.dense = nn.Linear(encoder.width, encoder.width)
        self.norm = nn.LayerNorm(encoder.width)
        self.dense.apply(draw_weights)

    def logits(self, tokens: Tensor, places: Tensor) -> Tensor:
        """What may stand at `places`, [batch, missing]: [batch, missing, vocabulary]."""
        x = self.encoder(tokens)
        x = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
        return F.linear(self.norm(F.gelu(self.dense(x))), self.encoder.token_embedding.weight)

    def forward(self, tokens: Tensor, places: Tensor, missing: Tensor) -> Tensor:
        """The mean cross-entropy of what is `missing` at `places`, in float32."""
        return F.cross_entropy(self.logits(tokens, places).flatten(0, 1).float(), missing.flatten())


class Classifier(nn.Module):
    """An encoder that is to tell classes, by the mean of what it says of all words."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, classes)
        self.head.apply(draw_weights)

    def logits(self, tokens: Tensor, words: Tensor) -> Tensor:
        """[batch, classes]."""
        x = self.encoder(tokens, words) * words[..., None]
        out: Tensor = self.head(x.sum(1) / words.sum(1, keepdim=True))
        return out

    def forward(self, tokens: Tensor, words: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy, in float32. Labels are smoothed: few of them are soon known by heart."""
        return F.cross_entropy(self.logits(tokens, words).float(), labels, label_smoothing=SMOOTHING)
