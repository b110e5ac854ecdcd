"""Ways to train, by name: each is one step of the loop that a user writes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from bench.memory.models import Inputs, loss_of

MICRO_BATCHES = 2

Draw = Callable[[], Inputs]
Mark = Callable[[str], None]
Step = Callable[[nn.Module, torch.optim.Optimizer, Draw, Mark], None]
"""Given the inputs of the next micro-batch, and who is told that another phase begins."""


def backward(model: nn.Module, inputs: Inputs) -> None:
    dtype = next(model.parameters()).dtype
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    torch.autograd.backward(loss_of(model(**cast)))


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, draw: Draw, mark: Mark) -> None:
    mark("forward, backward")
    backward(model, draw())
    mark("step")
    optimizer.step()
    optimizer.zero_grad()


def set_to_zero(model: nn.Module, optimizer: torch.optim.Optimizer, draw: Draw, mark: Mark) -> None:
    """Gradients stay where they are."""
    mark("forward, backward")
    backward(model, draw())
    mark("step")
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def never_cleared(model: nn.Module, optimizer: torch.optim.Optimizer, draw: Draw, mark: Mark) -> None:
    """Gradients of all steps add up."""
    mark("forward, backward")
    backward(model, draw())
    mark("step")
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, draw: Draw, mark: Mark) -> None:
    """All micro-batches communicate."""
    mark("forward, backward")
    for _ in range(MICRO_BATCHES):
        backward(model, draw())
    mark("step")
    optimizer.step()
    optimizer.zero_grad()


def unsynchronised(model: Any, optimizer: torch.optim.Optimizer, draw: Draw, mark: Mark) -> None:
    """The last micro-batch communicates for all."""
    mark("forward, backward")
    context: AbstractContextManager[object] = model.no_sync()
    with context:
        for _ in range(MICRO_BATCHES - 1):
            backward(model, draw())
    backward(model, draw())
    mark("step")
    optimizer.step()
    optimizer.zero_grad()


LOOPS: dict[str, Step] = {
    "plain": plain,
    "gradients set to zero": set_to_zero,
    "gradients never cleared": never_cleared,
    "accumulation": accumulated,
    "no_sync": unsynchronised,
}
