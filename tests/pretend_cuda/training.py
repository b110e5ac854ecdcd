"""Small models trained by zeroopt, on the CPU or on pretend devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import zeroopt

VOCABULARY, WIDTH, BATCH = 19, 8, 4


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


@dataclass(frozen=True)
class Loop:
    """A training loop.

    Attributes:
        options: of `zeroopt.wrap`.
        accumulate: backward passes a step.
        no_sync: all but the last of them under `no_sync()`.
        clip: torch's clipping, by this norm.
        scaler: with a GradScaler.
        warm_up: steps that come before those that are looked at; buckets are planned anew in the first one.
        steps: that are looked at.
        depth: layers of the model.
    """

    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    no_sync: bool = False
    clip: float | None = None
    scaler: bool = False
    warm_up: int = 2
    steps: int = 1
    depth: int = 2
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw

    def wrap(self, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The wrapped model, the same on all ranks."""
        model = Model(self.depth)
        generator = torch.Generator().manual_seed(0)  # of its own: ranks may be threads
        for param in model.parameters():
            nn.init.normal_(param.data, std=0.3, generator=generator)
        model.to(device)
        options = {"bucket_mb": 0.0005, "transport": "torch", **self.options}
        return zeroopt.wrap(model, self.optimizer(model.parameters()), **options)


class Model(nn.Module):
    """An embedding, some layers and a head: about a thousand parameters."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.norm(x))


def batch_of(rank: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and what follows each."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    tokens = torch.randint(VOCABULARY, (BATCH + 1,), generator=generator).to(device)
    return tokens[:-1], tokens[1:]


class Trainer:
    """One rank's training."""

    def __init__(self, loop: Loop, rank: int, device: torch.device) -> None:
        self._loop = loop
        self.model, self.optimizer = loop.wrap(device)
        count = (loop.warm_up + loop.steps) * loop.accumulate
        self._batches = iter([batch_of(rank, number, device) for number in range(count)])
        self._scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=loop.scaler)

    def step(self) -> None:
        loop = self._loop
        for number in range(loop.accumulate):
            is_last = number == loop.accumulate - 1
            with self.model.no_sync() if loop.no_sync and not is_last else nullcontext():
                self.backward()
        if loop.clip is not None:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), loop.clip, foreach=False)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()

    def backward(self) -> None:
        tokens, following = next(self._batches)
        loss = nn.functional.cross_entropy(self.model(tokens).float(), following) / self._loop.accumulate
        self._scaler.scale(loss).backward()

    def parameters(self) -> list[Tensor]:
        """Copies on the CPU."""
        return [param.detach().cpu().clone() for param in self.model.parameters()]


def train(
    loop: Loop, rank: int, device: torch.device, recorded: Callable[[], AbstractContextManager[None]] = nullcontext
) -> list[Tensor]:
    """The parameters after all steps of this rank.

    Args:
        recorded: a context for the steps that are looked at.
    """
    trainer = Trainer(loop, rank, device)
    for _ in range(loop.warm_up):
        trainer.step()
    with recorded():
        for _ in range(loop.steps):
            trainer.step()
    return trainer.parameters()
