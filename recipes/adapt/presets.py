"""Sizes, and how each is adapted.

python -m zeroopt estimate --model recipes.adapt.presets:LORA_17B --world-size 64 --device cuda --option param_dtype=bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.adapt.lora import add_adapters
from recipes.generate import presets as gpt
from recipes.generate.model import GPT

LAYERS = ("qkv", "attention_out", "mlp_in", "mlp_out")  # that get adapters


@dataclass(frozen=True)
class Preset:
    """A size.

    Attributes:
        trunk: of the GPT that is adapted.
        trunk_steps: of its training, where none is given.
        rank: of adapters.
        batch: questions a step, of all ranks together.
        steps, choice_steps: of learning to answer, and of learning which answers are preferred.
        beta: of the preference loss.
    """

    trunk: gpt.Preset
    trunk_steps: int
    rank: int
    batch: int
    steps: int
    choice_steps: int
    lr: float
    beta: float = 0.3

    def make(self) -> GPT:
        """With adapters."""
        model = self.trunk.make()
        add_adapters(model, LAYERS, self.rank, alpha=2 * self.rank)
        return model

    def __call__(self) -> tuple[GPT, tuple[Tensor, Tensor]]:
        """For `python -m zeroopt estimate --model`: the model, and what it is called with on a rank with one question."""
        tokens = torch.zeros(1, self.trunk.context, dtype=torch.long)
        return self.make(), (tokens, tokens)


LORA_1M = Preset(gpt.GPT_1M, trunk_steps=150, rank=8, batch=32, steps=80, choice_steps=50, lr=5e-3)
LORA_3M = Preset(gpt.GPT_3M, trunk_steps=600, rank=8, batch=32, steps=300, choice_steps=150, lr=3e-3)
LORA_124M = Preset(gpt.GPT_124M, trunk_steps=20_000, rank=16, batch=64, steps=1000, choice_steps=500, lr=5e-4)
LORA_1_5B = Preset(gpt.GPT_1_5B, trunk_steps=100_000, rank=32, batch=64, steps=1000, choice_steps=500, lr=3e-4)
LORA_17B = Preset(gpt.GPT_17B, trunk_steps=300_000, rank=64, batch=128, steps=1000, choice_steps=500, lr=2e-4)

PRESETS = {"1m": LORA_1M, "3m": LORA_3M, "124m": LORA_124M, "1.5b": LORA_1_5B, "17b": LORA_17B}
