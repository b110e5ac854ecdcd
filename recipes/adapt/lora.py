"""Adapters: what a linear layer learns while its own weight stays as it is (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A linear layer with a product of two narrow matrices beside its weight: W x + b + alpha / rank · B A x.

    Weight and bias are those of the layer that it stands for, under the same names: checkpoints of a model without adapters fit.

    Args:
        layer: whose parameters it takes over, frozen.
        rank: rows of A, [rank, inputs], and columns of B, [outputs, rank].
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_empty(layer.out_features, rank))
        self.scale = alpha / rank
        if not layer.weight.is_meta:
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """B is zero at the beginning: the layer does what it did without."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        added = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * added

    def merged(self) -> nn.Linear:
        """A plain layer that does the same."""
        outputs, inputs = self.weight.shape
        layer = nn.Linear(inputs, outputs, device="meta")
        layer.weight = nn.Parameter(self.weight + self.scale * (self.lora_b @ self.lora_a))
        layer.bias = self.bias
        return layer


def add_adapters(model: nn.Module, layers: Collection[str], rank: int, alpha: float) -> None:
    """Freeze a model, and put adapters into those of its linear layers that have one of these names (the last part of each)."""
    model.requires_grad_(requires_grad=False)
    for path, layer in list(model.named_modules()):
        holder, _, name = path.rpartition(".")
        if isinstance(layer, nn.Linear) and name in layers:
            setattr(model.get_submodule(holder), name, LoRALinear(layer, rank, alpha))


def draw_adapter(module: nn.Module) -> None:
    """Values at the beginning, of one module and not of its parts: for `zeroopt.wrap(init=…)`."""
    if isinstance(module, LoRALinear):
        module.reset_adapter()


def merge_adapters(model: nn.Module) -> None:
    """Make a model with adapters a plain one that does the same."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            holder, _, name = path.rpartition(".")
            setattr(model.get_submodule(holder), name, layer.merged())
