"""A small GPT: pre-norm blocks, causal attention. Nothing in it knows how it is trained."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def draw_weights(module: nn.Module) -> None:
    """Give the matrices of one module, not of its parts, their values at the beginning."""
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x

    def attend(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        heads = self.qkv(x).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, context, width))
        return out


class GPT(nn.Module):
    """Maps tokens and the tokens that follow them to the mean cross-entropy. `tied`: logits use the token embedding."""

    def __init__(
        self, vocabulary: int, context: int, layers: int, width: int, heads: int, *, tied: bool = True
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(draw_weights)
        if tied:
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = self.final_norm(self.blocks(x))
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())  # exact in 16 bits too
