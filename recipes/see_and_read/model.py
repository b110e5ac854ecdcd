"""CoCa (Yu et al. 2022, arXiv 2205.01917): contrastive features and captions from one model. Nothing in it knows how it is trained."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recipes.see_and_read.scenes import END
from recipes.transformer import Block, Blocks, draw_weights
from recipes.vit import ViT

LARGEST_SCALE = math.log(100)  # as CLIP's, in logarithms


class Seen(NamedTuple):
    """What the model makes of pictures and captions.

    Attributes:
        images, texts: (batch, features), of length 1.
        scale: by which similarities count.
        logits: (batch, length, vocabulary), of the tokens that follow.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor
    logits: Tensor


class LookingBlock(nn.Module):
    """Each place looks at a picture's tokens (batch, patches, image_width), and then goes through a causal block."""

    def __init__(self, width: int, heads: int, image_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.look = nn.MultiheadAttention(width, heads, kdim=image_width, vdim=image_width, batch_first=True)
        self.block = Block(width, heads, causal=True)

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        looked, _ = self.look(self.norm(x), picture, picture, need_weights=False)
        out: Tensor = self.block(x + looked)
        return out


class CoCa(nn.Module):
    """Pictures and tokens to `Seen`.

    Args:
        picture: the tower for pictures.
        length: the most tokens of a caption.
        layers: of the tower for captions alone, and of the one above it that looks at pictures.
        recomputed: whether activations of blocks are computed once more in backward, rather than kept.
    """

    def __init__(
        self,
        picture: ViT,
        vocabulary: int,
        length: int,
        layers: int,
        width: int,
        heads: int,
        *,
        recomputed: bool = False,
    ) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        self.reading = Blocks(layers, width, heads, causal=True, recomputed=recomputed)
        self.reading_norm = nn.LayerNorm(width)
        self.writing = nn.ModuleList(LookingBlock(width, heads, picture.width) for _ in range(layers))
        self.writing_norm = nn.LayerNorm(width)
        self.image_feature = nn.Linear(picture.width, width, bias=False)
        self.text_feature = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.apply(draw_weights)
        self.picture = picture

    def forward(self, pictures: Tensor, tokens: Tensor) -> Seen:
        """(batch, channels, size, size) and (batch, length), each row of which has an END."""
        patches = self.picture(pictures)
        read = self.read(tokens)
        return Seen(
            F.normalize(self.image_feature(patches[:, 0]), dim=-1),
            self.feature(read, tokens),
            self.log_scale.clamp(max=LARGEST_SCALE).exp(),
            self.write(read, patches),
        )

    def read(self, tokens: Tensor) -> Tensor:
        """What the tower for captions makes of each token and those before it."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        read: Tensor = self.reading(self.token_embedding(tokens) + self.position_embedding(positions))
        return read

    def feature(self, read: Tensor, tokens: Tensor) -> Tensor:
        """At the first END, which is the first that has seen the whole caption."""
        end = (tokens == END).int().argmax(1)
        whole = self.reading_norm(read[torch.arange(len(read), device=read.device), end])
        return F.normalize(self.text_feature(whole), dim=-1)

    def write(self, read: Tensor, patches: Tensor) -> Tensor:
        """Logits of the tokens that follow."""
        for block in self.writing:
            if self.recomputed and torch.is_grad_enabled():
                read = checkpoint(block, read, patches, use_reentrant=False)
            else:
                read = block(read, patches)
        return F.linear(self.writing_norm(read), self.token_embedding.weight)


def caption_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each token after those before it, up to the first END."""
    following = tokens[:, 1:]
    counted = tokens[:, :-1] != END
    return F.cross_entropy(logits[:, :-1][counted].float(), following[counted])
