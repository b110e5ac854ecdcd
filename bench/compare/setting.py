"""What all methods have in common: the model, the data, the precision and the ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.model import HEAD_WIDTH, count_parameters, make_model

PRECISIONS = ("float32", "bfloat16")
NUM_BATCHES = 2  # the same few again and again, so that the loss falls fast and tells whether gradients are averaged


@dataclass(frozen=True)
class Setting:
    """One model trained in one way by `world_size` ranks.

    Attributes:
        tokens: of a sequence; a micro-batch is one sequence a rank.
        accumulation: micro-batches a rank and step.
        precision: "float32", or "bfloat16": float32 optimizer and parameters, products in bfloat16, as each method does that.
        bucket_mb: MiB of a bucket, for every method that has buckets; None leaves each at its default.
        threads: CPU threads a rank.
        device: "cpu" or "cuda".
        checkpointing: activations are computed once more in backward, block by block, rather than kept.
    """

    layers: int
    width: int
    vocabulary: int
    tokens: int
    accumulation: int
    precision: str
    bucket_mb: float | None
    world_size: int
    threads: int
    device: str
    checkpointing: bool = False
    seed: int = 0
    lr: float = 1e-4

    @property
    def tokens_a_step(self) -> int:
        """Of all ranks."""
        return self.tokens * self.accumulation * self.world_size

    @property
    def parameters(self) -> int:
        return count_parameters(self.vocabulary, self.tokens, self.layers, self.width)

    def make_model(self) -> nn.Module:
        """Float32, on the default device; the same on all ranks."""
        torch.manual_seed(self.seed)
        model: nn.Module = make_model(
            self.vocabulary, self.tokens, self.layers, self.width, checkpointing=self.checkpointing
        )
        return model

    def tiny(self) -> Setting:
        """The same in small, for what torch and others load or allocate at a first step."""
        return replace(self, layers=1, width=HEAD_WIDTH, vocabulary=64, tokens=16)

    def draw(self, step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, both (1, tokens) on the CPU."""
        batch = (step % NUM_BATCHES * self.accumulation + micro) * self.world_size + rank
        generator = torch.Generator().manual_seed(self.seed * 10**6 + batch)
        drawn = torch.randint(self.vocabulary, (1, self.tokens + 1), generator=generator)
        return drawn[:, :-1], drawn[:, 1:]


SHAPES = {"tiny": (1, 64), "gpt-10m": (4, 256), "gpt-34m": (8, 512), "gpt-98m": (12, 768), "gpt-320m": (24, 1024)}


def shape_of(model: str, vocabulary: int) -> tuple[int, int]:
    """Layers and width of a model: a name among `SHAPES`, or a number of parameters such as "5M" or "1.3B".

    Raises:
        ValueError: it is neither.
    """
    if model in SHAPES:
        return SHAPES[model]
    number = re.fullmatch(r"([\d.]+)([MB])", model)
    if number is None:
        raise ValueError(f"expected a model among {', '.join(SHAPES)} or a size such as 5M or 1.3B, got {model!r}")
    return fitted_shape(float(number[1]) * {"M": 1e6, "B": 1e9}[number[2]], vocabulary)


def fitted_shape(parameters: float, vocabulary: int) -> tuple[int, int]:
    """Layers and width that come near so many parameters, about as many layers as there are heads."""

    def strangeness(shape: tuple[int, int]) -> float:
        layers, width = shape
        numel = 2 * vocabulary * width + 12 * layers * width**2
        return abs(numel / parameters - 1) + abs(layers - width / HEAD_WIDTH) / (width / HEAD_WIDTH) / 4

    shapes = []
    for width in range(HEAD_WIDTH, 8192, HEAD_WIDTH):
        left = parameters - 2 * vocabulary * width
        shapes.append((max(1, round(left / (12 * width**2))), width))
    return min(shapes, key=strangeness)
