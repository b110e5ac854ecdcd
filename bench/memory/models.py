"""Models to measure with, by name. Those of transformers are in `architectures.py`, which is imported where it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bench.memory.gpt import GPT

Inputs = dict[str, Tensor]

if find_spec("transformers"):  # before anything is measured, and in the server that ranks are forked from
    from bench.memory import architectures


@dataclass(frozen=True)
class Model:
    """How to make a model, and what it is fed.

    Attributes:
        make: float32, with random weights.
        inputs: of one micro-batch, keyword arguments of its forward, which gives the loss, or an object with a `loss`.
        package: one without which it cannot be made.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[Generator], Inputs]
    package: str | None = None

    def why_not(self) -> str | None:
        """What its row says instead of figures; None where it can be made."""
        return None if self.package is None or find_spec(self.package) else f"not installed: {self.package}"


def count_parameters(model: Model) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in model.make().parameters())


def loss_of(output: Any) -> Tensor:
    loss: Tensor = output if isinstance(output, Tensor) else output.loss
    return loss


def gpt(layers: int, width: int, vocabulary: int, tokens: int, *, shuffled: bool = False) -> Model:
    def inputs(generator: Generator) -> Inputs:
        drawn = torch.randint(vocabulary, (1, tokens + 1), generator=generator)
        return {"tokens": drawn[:, :-1], "targets": drawn[:, 1:]}

    return Model(partial(GPT, layers, width, vocabulary, tokens, shuffled=shuffled), inputs)


def text(name: str, tokens: int, vocabulary: int, **sizes: Any) -> Model:
    """An architecture that is fed one sequence."""

    def inputs(generator: Generator) -> Inputs:
        drawn = torch.randint(3, vocabulary, (1, tokens), generator=generator)
        return {"input_ids": drawn, "labels": drawn}

    return of_transformers(name, inputs, vocab_size=vocabulary, **sizes)


def images(name: str, pixels: int, **sizes: Any) -> Model:
    """An architecture that is fed two images."""

    def inputs(generator: Generator) -> Inputs:
        shape = (2, 3, pixels, pixels)
        return {"pixel_values": torch.randn(shape, generator=generator), "labels": torch.zeros(2, dtype=torch.long)}

    return of_transformers(name, inputs, num_labels=1000, **sizes)


def of_transformers(name: str, inputs: Callable[[Generator], Inputs], **sizes: Any) -> Model:
    def make() -> nn.Module:
        net: nn.Module = getattr(architectures, name)(**sizes)
        return net.train()

    return Model(make, inputs, "transformers")


def encoder(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }


def t5_sizes(width: int, layers: int) -> dict[str, int]:
    return {"d_model": width, "d_ff": 4 * width, "num_layers": layers, "num_heads": width // 64}


def mixture_sizes(width: int, layers: int, experts: int) -> dict[str, int]:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    return {**sizes, **heads, "num_local_experts": experts, "num_experts_per_tok": 2}


MODELS: dict[str, Model] = {
    "gpt-98m": gpt(12, 768, 8192, 128),
    "gpt-98m-shuffled": gpt(12, 768, 8192, 128, shuffled=True),
    "gpt-34m": gpt(8, 512, 8192, 128),
    "gpt-34m-shuffled": gpt(8, 512, 8192, 128, shuffled=True),
    "gpt2-82m": text("gpt2", 64, 50257, n_layer=6),
    "bert-110m": text("bert", 64, 30522, **encoder(768, 12)),
    "t5-61m": text("t5", 64, 32128, **t5_sizes(512, 6)),
    "vit-86m": images("vit", 224, **encoder(768, 12)),
    "resnet-152": images("resnet", 64, depths=[3, 8, 36, 3]),
    "mixture-130m": text("mixture", 64, 8192, **mixture_sizes(512, 6, 8)),
    # Of the same kinds, for tests.
    "gpt-small": gpt(8, 384, 4096, 32),
    "gpt-small-shuffled": gpt(8, 384, 4096, 32, shuffled=True),
    "gpt2-small": text("gpt2", 32, 24576, n_layer=6, n_embd=384, n_head=6),
    "bert-small": text("bert", 32, 8192, **encoder(384, 6)),
    "t5-small": text("t5", 32, 8192, **t5_sizes(384, 3)),
    "vit-small": images("vit", 64, image_size=64, **encoder(384, 8)),
    "resnet-small": images("resnet", 32, depths=[1, 1, 2, 2]),
    "mixture-small": text("mixture", 32, 4096, **mixture_sizes(384, 3, 4)),
    "gpt-tiny": gpt(1, 64, 1024, 16),
}
"""gpt-98m is 97.7 M parameters as docs/performance.md counts them; gpt2-82m's embedding is 38.6 M."""
