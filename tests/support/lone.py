"""A model that this process trains by itself, for tests of the parts that a wrapped model has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import zeroopt
from zeroopt.replica import Replica

LAYERS, WIDTH = 4, 6


class Lone:
    """Layers of one matrix and one bias each, in buckets of one layer or a little more.

    Attributes:
        optimizer: plain SGD unless another one is made.
    """

    def __init__(self, stage: int = 0, make: Any = torch.optim.SGD, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        inner = make(self.net.parameters(), lr=0.5)
        options = {"stage": stage, "bucket_mb": 0.0003, "fused": False, **options}
        self.model, self.optimizer = zeroopt.wrap(self.net, inner, **options)

    @property
    def replica(self) -> Replica:
        return self.optimizer.replica

    def backward(self, number: int = 0) -> None:
        """Of a loss that depends on a number."""
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(number))
        self.model(x).square().mean().backward()

    def step(self, number: int = 0) -> None:
        self.backward(number)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_state(self) -> dict[int, dict[str, Any]]:
        """The optimizer's state, by the position of the parameter."""
        self.optimizer.consolidate_state_dict()
        state: dict[int, dict[str, Any]] = self.optimizer.full_state_dict()["state"]
        return state
