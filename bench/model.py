"""The model that benchmarks train: that of examples/gpt.py, with logits of their own."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gpt import GPT

HEAD_WIDTH = 64


def make_model(vocabulary: int, tokens: int, layers: int, width: int) -> GPT:
    return GPT(vocabulary, tokens, layers, width, width // HEAD_WIDTH, tied=False)


def count_parameters(vocabulary: int, tokens: int, layers: int, width: int) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in make_model(vocabulary, tokens, layers, width).parameters())
