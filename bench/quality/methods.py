"""Ways to train data-parallel, by name. Ranks of this machine send each other messages, as ranks of several hosts would."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zeroopt

Trained = tuple[nn.Module, torch.optim.Optimizer]
Method = Callable[[nn.Module, torch.optim.Optimizer], Trained]

BASELINE = "DDP"


def ddp(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trained:
    return DistributedDataParallel(model), optimizer


def nesterov(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The outer optimizer of DiLoCo (arXiv:2311.08105)."""
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


def zero(**options: Any) -> Method:
    return lambda model, optimizer: zeroopt.wrap(model, optimizer, stage=2, transport="pairwise", **options)


METHODS: dict[str, Method] = {
    BASELINE: ddp,
    "stage 2": zero(),
    "bfloat16 gradients": zero(reduce_dtype=torch.bfloat16),
    "int8 gradients": zero(gradient_compression="int8"),
    "int4 gradients": zero(gradient_compression="int4"),
    "int8 parameters": zero(parameter_compression="int8"),
    "int4 parameters": zero(parameter_compression="int4"),
    "int8 gradients and parameters": zero(gradient_compression="int8", parameter_compression="int8"),
    "int4 gradients and parameters": zero(gradient_compression="int4", parameter_compression="int4"),
    "average every 16": zero(average_every=16),
    "DiLoCo every 16": zero(average_every=16, outer_optimizer=nesterov),
    "DiLoCo every 16, 4 fragments, int8": zero(
        average_every=16, outer_optimizer=nesterov, outer_fragments=4, outer_delay=2, outer_dtype="int8"
    ),
}
