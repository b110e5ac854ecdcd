"""A GPT whose layers are not defined in the order in which they run, as those of many models are not."""

from __future__ import annotations

import random
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 64

Layers = dict[str, Callable[[], nn.Module]]  # by name, in the order in which they are defined


class GPT(nn.Module):
    """Maps tokens and the tokens that follow them to the mean cross-entropy.

    Args:
        shuffled: all layers are defined in an order drawn at random, the same in every process. Otherwise only those of a block
            are in another order than the one in which they run: norms come first.
    """

    def __init__(self, layers: int, width: int, vocabulary: int, context: int, *, shuffled: bool) -> None:
        super().__init__()
        self.layers = layers
        blocks: Layers = {block_name(i): lambda: Block(width, shuffled=shuffled) for i in range(layers)}
        define(
            self,
            {
                "tokens": lambda: nn.Embedding(vocabulary, width),
                "positions": lambda: nn.Embedding(context, width),
                **blocks,
                "norm": lambda: nn.LayerNorm(width),
                "head": lambda: nn.Linear(width, vocabulary, bias=False),
            },
            shuffled=shuffled,
        )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.get_submodule("tokens")(tokens) + self.get_parameter("positions.weight")[: tokens.shape[1]]
        for i in range(self.layers):
            x = self.get_submodule(block_name(i))(x)
        logits: Tensor = self.get_submodule("head")(self.get_submodule("norm")(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Block(nn.Module):
    """Pre-norm, with causal attention."""

    def __init__(self, width: int, *, shuffled: bool) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        layers: Layers = {
            "ln1": lambda: nn.LayerNorm(width),
            "ln2": lambda: nn.LayerNorm(width),
            "qkv": lambda: nn.Linear(width, 3 * width),
            "o": lambda: nn.Linear(width, width),
            "up": lambda: nn.Linear(width, 4 * width),
            "down": lambda: nn.Linear(4 * width, width),
        }
        define(self, layers, shuffled=shuffled)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.get_submodule
        x = x + layer("o")(self.attend(layer("qkv")(layer("ln1")(x))))
        out: Tensor = x + layer("down")(F.gelu(layer("up")(layer("ln2")(x))))
        return out

    def attend(self, qkv: Tensor) -> Tensor:
        batch, context, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        query, key, value = qkv.view(batch, context, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, context, width)


def block_name(index: int) -> str:
    return f"block{index}"


def define(module: nn.Module, layers: Layers, *, shuffled: bool) -> None:
    names = list(layers)
    if shuffled:
        random.Random(0).shuffle(names)
    for name in names:
        module.add_module(name, layers[name]())
