"""The model that benchmarks train: that of examples/gpt.py, with logits of their own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gpt import GPT

HEAD_WIDTH = 64


def make_model(vocabulary: int, tokens: int, layers: int, width: int) -> GPT:
    return GPT(vocabulary, tokens, layers, width, width // HEAD_WIDTH, tied=False)
