"""The model that benchmarks train: that of examples/gpt.py, with logits of their own."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zeroopt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gpt import GPT, draw_weights

HEAD_WIDTH = 64

INIT = (zeroopt.reset_parameters, draw_weights)
"""What gives a model on the meta device the values that its constructor would have given it."""


class Checkpointed(nn.Sequential):
    """Parts that each keep what they were given, and run once more in backward for the rest (arXiv 1604.06174)."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = checkpoint(part, x, use_reentrant=False)
        return x


def make_model(vocabulary: int, tokens: int, layers: int, width: int, *, checkpointing: bool = False) -> GPT:
    model = GPT(vocabulary, tokens, layers, width, width // HEAD_WIDTH, tied=False)
    if checkpointing:
        model.blocks = Checkpointed(*model.blocks)
    return model


def count_parameters(vocabulary: int, tokens: int, layers: int, width: int) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in make_model(vocabulary, tokens, layers, width).parameters())
