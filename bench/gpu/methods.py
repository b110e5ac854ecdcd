"""GPTs by name, and ways to train them: DDP, and zeroopt's stages and precisions over the backend's collectives."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zeroopt
from bench.compare import formula
from bench.model import count_parameters, make_model
from zeroopt.collectives import Transport
from zeroopt.collectives.all_to_all import AllToAllTransport
from zeroopt.collectives.hierarchy import HierarchyTransport
from zeroopt.collectives.levels import Levels
from zeroopt.collectives.site import Site
from zeroopt.collectives.torch_native import TorchTransport

DDP = "DDP, fused AdamW"


@dataclass(frozen=True)
class Shape:
    """A GPT and what a rank feeds it in a step."""

    layers: int
    width: int
    vocabulary: int
    tokens: int
    sequences: int
    steps: int

    def make_model(self) -> nn.Module:
        """Float32, on the default device, the same on all ranks."""
        torch.manual_seed(0)
        model: nn.Module = make_model(self.vocabulary, self.tokens, self.layers, self.width)
        return model

    @property
    def parameters(self) -> int:
        return count_parameters(self.vocabulary, self.tokens, self.layers, self.width)


SHAPES = {
    "tiny": Shape(layers=1, width=64, vocabulary=256, tokens=16, sequences=1, steps=2),
    "gpt-350m": Shape(layers=24, width=1024, vocabulary=24576, tokens=1024, sequences=4, steps=20),
    # So little to compute that a step takes as long as the host needs for it: 300 and 2,000 parameters.
    "300 small": Shape(layers=37, width=64, vocabulary=256, tokens=16, sequences=1, steps=20),
    "2,000 small": Shape(layers=249, width=64, vocabulary=256, tokens=16, sequences=1, steps=10),
}


@dataclass(frozen=True)
class Method:
    """How a model is prepared.

    Attributes:
        formula: bytes a parameter that a rank should hold.
        options: of `zeroopt.wrap`; None for DDP.
        precision: "float32", in which products are in bfloat16 under autocast, or "bfloat16".
    """

    formula: formula.Formula
    options: dict[str, Any] | None = None
    precision: str = "float32"

    def prepare(self, net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.options is None:
            model = DistributedDataParallel(net, gradient_as_bucket_view=True)
            return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
        return zeroopt.wrap(net, optimizer, **{"transport": sums_here, **self.options})

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "float32" else nullcontext()


def sums_here(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """What "auto" takes for GPUs of one host; with one rank, too, which would send nothing otherwise."""
    return AllToAllTransport.connect(Site(group, device))


def sums_of_backend(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """What "auto" takes for GPUs of several hosts."""
    return TorchTransport.connect(Site(group, device))


def sums_in_levels(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """What "auto" takes for GPUs of many hosts, as if each rank were a host of its own: with few ranks, too, there are two levels."""
    levels = Levels((1, group.size()), tuple(range(group.size())))
    return HierarchyTransport(Site(group, device), levels)


def zero(stage: int, **options: Any) -> Method:
    precision = "float32" if "param_dtype" not in options else "bfloat16"
    counted = {name: options[name] for name in ("master_weights", "state_dtype") if name in options}
    return Method(formula.zero(stage, **counted), {"stage": stage, **options}, precision)


BF16: dict[str, Any] = {"param_dtype": torch.bfloat16}

METHODS: dict[str, Method] = {
    DDP: Method(formula.replicated),
    "stage 2": zero(2),
    "stage 2, bfloat16": zero(2, **BF16),
    "stage 2, the backend's sums": zero(2, transport=sums_of_backend),
    "stage 1": zero(1),
    "stage 0": zero(0),
    "stage 2, clipped": zero(2, max_grad_norm=1.0),
    "stage 2, remainders, 8 bits": zero(2, **BF16, master_weights="remainder", state_dtype=torch.int8),
}
