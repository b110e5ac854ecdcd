"""Small models trained by zeroopt, on the CPU or on pretend devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zeroopt

VOCABULARY, WIDTH, BATCH = 19, 8, 4
BF16 = {"param_dtype": torch.bfloat16}


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
        depth, width: layers of the model, and of each.
        side: what a user has on a stream of their own: "" nothing, "loop" all of it, "forward" the forward, "branch" one layer,
            "average" an average of the parameters that is taken after each step. On a device.
        device: "current", or the "other" one of a rank.
        across_slices: whole parameters are to lie across slices; see `no_padding`.
        recomputed: backward recomputes layers, by checkpoints with use_reentrant, of which each rank has one more than the one before.
        ranks: that train together.
        shard_ranks: of a shard group, neighbours; 0: there is none.
    """

    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    no_sync: bool = False
    clip: float | None = None
    scaler: bool = False
    warm_up: int = 2
    steps: int = 1
    depth: int = 2
    width: int = WIDTH
    side: str = ""
    device: str = "current"
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw
    across_slices: bool = False
    recomputed: bool = False
    ranks: int = 2
    shard_ranks: int = 0

    def wrap(self, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The wrapped model, the same on all ranks."""
        model = Model(self.depth, self.width)
        generator = torch.Generator().manual_seed(0)  # of its own: ranks may be threads
        for param in model.parameters():
            nn.init.normal_(param.data, std=0.3, generator=generator)
        model.to(device)
        if self.recomputed:
            model.segments = 1 + dist.get_rank()
        options = {"bucket_mb": 0.0005, "transport": "torch", **self.options}
        if self.shard_ranks:
            options["shard_group"] = neighbours(self.shard_ranks)
        return zeroopt.wrap(model, self.optimizer(model.parameters()), **options)


def neighbours(size: int) -> dist.ProcessGroup:
    """Of the groups of so many ranks that follow one another, the one with this rank. Collective."""
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)]
    return groups[dist.get_rank() // size]


class Model(nn.Module):
    """An embedding, some layers and a head: a few hundred parameters.

    Attributes:
        branch: the context of the first layer.
        segments: of checkpointing that a layer is used in; 0: it is used without.
    """

    branch: AbstractContextManager[None] = nullcontext()
    segments = 0

    def __init__(self, depth: int, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for number, layer in enumerate(self.layers):
            with self.branch if number == 0 else nullcontext():
                if x.is_cuda:  # as a user has to say of what another stream has made
                    x.record_stream(torch.cuda.current_stream())
                for _ in range(self.segments):
                    x = checkpoint(layer, x, use_reentrant=True)
                x = torch.relu(x if self.segments else layer(x))
        return self.head(self.norm(x))


def batch_of(rank: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and what follows each."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    tokens = torch.randint(VOCABULARY, (BATCH + 1,), generator=generator).to(device)
    return tokens[:-1], tokens[1:]


class Side:
    """A stream of the user's, which waits for the current one and has it wait, as a user has to see to. May be used anew."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        self._entered = torch.cuda.stream(self._stream)
        self._entered.__enter__()

    def __exit__(self, *error: object) -> None:
        self._entered.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self._stream)


class Trainer:
    """One rank's training."""

    def __init__(self, loop: Loop, rank: int, device: torch.device) -> None:
        self._loop = loop
        self.model, self.optimizer = loop.wrap(device)
        count = (loop.warm_up + loop.steps) * loop.accumulate
        self._batches = iter([batch_of(rank, number, device) for number in range(count)])
        self._scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=loop.scaler)
        self._average = [torch.zeros_like(param) for param in self.model.parameters()]
        self._side = Side() if loop.side and device.type == "cuda" else None
        if self._side is not None and loop.side == "branch":
            self.model.module.branch = self._side

    def on_side(self, what: str) -> AbstractContextManager[None]:
        """The context of one of the things that `Loop.side` names."""
        return nullcontext() if self._side is None or self._loop.side != what else self._side

    def step(self) -> None:
        with self.on_side("loop"):
            self._backward_passes()
            self._update()
        with self.on_side("average"), torch.no_grad():
            for average, param in zip(self._average, self.model.parameters(), strict=True):
                average.lerp_(param, 0.5)

    def _backward_passes(self) -> None:
        loop = self._loop
        for number in range(loop.accumulate):
            is_last = number == loop.accumulate - 1
            with self.model.no_sync() if loop.no_sync and not is_last else nullcontext():
                self._backward()

    def _backward(self) -> None:
        tokens, following = next(self._batches)
        with self.on_side("forward"):
            logits = self.model(tokens)
        loss = nn.functional.cross_entropy(logits.float(), following) / self._loop.accumulate
        self._scaler.scale(loss).backward()

    def _update(self) -> None:
        if self._loop.clip is not None:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._loop.clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()

    def results(self) -> list[Tensor]:
        """Copies of the parameters and their average, on the CPU."""
        return [tensor.detach().cpu().clone() for tensor in (*self.model.parameters(), *self._average)]


def train(
    loop: Loop, rank: int, device: torch.device, recorded: Callable[[], AbstractContextManager[None]] = nullcontext
) -> list[Tensor]:
    """The parameters after all steps of this rank, and their average.

    Args:
        recorded: a context for the steps that are looked at.
    """
    trainer = Trainer(loop, rank, device)
    for _ in range(loop.warm_up):
        trainer.step()
    with recorded():
        for _ in range(loop.steps):
            trainer.step()
    return trainer.results()
