"""What a method is, and what it makes of a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bench.compare.formula import Formula
from bench.compare.setting import Setting


@dataclass
class Training:
    """A model ready to be trained by one method: what most methods do in a step.

    Attributes:
        model: takes tokens and targets, and gives the loss.
        unsynchronised: a context for micro-batches whose gradients stay on the rank until a later one.
        autocast: whether products are computed in bfloat16 by `torch.autocast`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    unsynchronised: Callable[[], AbstractContextManager[object]] = nullcontext
    autocast: bool = False

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.model(tokens, targets)
        return loss

    def backward(self, loss: Tensor, accumulation: int) -> None:
        torch.autograd.backward(loss / accumulation)

    def end_micro_batch(self) -> None:
        """After every micro-batch but the last, whose gradients `step` takes."""

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


Prepare = Callable[[nn.Module, Setting], Training]
Obstacle = Callable[[Setting], str | None]


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        prepare: wraps a float32 model. Every rank calls it.
        formula: bytes a parameter that a rank should hold.
        needs: modules without which it cannot run.
        obstacle: why it cannot run in a setting; None where it can.
        rounds_state: its optimizer keeps state in less than float32, so losses may differ a little more.
        communicates: all but the bound do.
        on_meta: the model that it is given is on the meta device, and gets its values in `prepare`.
    """

    name: str
    prepare: Prepare
    formula: Formula
    needs: tuple[str, ...] = ()
    obstacle: Obstacle = lambda setting: None
    rounds_state: bool = False
    communicates: bool = True
    on_meta: bool = False

    def why_not(self, setting: Setting) -> str | None:
        """What its row says instead of figures; None where it can run."""
        missing = [module for module in self.needs if not is_installed(module)]
        if missing:
            return f"not installed: {', '.join(missing)}"
        return self.obstacle(setting)


def is_installed(module: str) -> bool:
    return find_spec(module) is not None


def adamw(net: nn.Module, setting: Setting, **implementation: Any) -> torch.optim.Optimizer:
    """torch's; `fused=True` or `foreach=True`, or what it chooses by itself."""
    return torch.optim.AdamW(net.parameters(), lr=setting.lr, **implementation)


def needs_cpu(setting: Setting) -> str | None:
    return None if setting.device == "cpu" else "needs CPU ranks"
