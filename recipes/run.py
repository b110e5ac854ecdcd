"""A training on this rank: what it shows while it goes on, and what it notes down."""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from recipes.memory import Memory
from recipes.outcome import Figure, Outcome

WARMUP_STEPS = 3  # not timed: they allocate
LINES = 10  # a phase, where the output is no terminal


class Run:
    """Wraps around a training loop, which stays the reader's. Collective to make.

    run = Run(args, device)                      # before there is a model
    for step in run.steps("training", args.steps):
        loss = model(batch)
        ...
        run.note(loss)
    return run.outcome(model, figures)
    """

    def __init__(self, args: Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.memory = Memory(device)
        self.held = 0
        self.losses: dict[str, list[float]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.phase = ""

    def steps(self, phase: str, end: int, begin: int = 0) -> Iterator[int]:
        """The numbers of steps from `begin` to `end`, each timed until the next is asked for."""
        self.phase = phase
        losses, seconds = self.losses.setdefault(phase, []), self.seconds.setdefault(phase, [])
        with progress(phase, end) as show:
            for step in range(begin, end):
                started = time.perf_counter()
                yield step
                seconds.append(time.perf_counter() - started)
                self._look_at_memory()
                show(step, losses[-1] if losses else None)

    def note(self, loss: Tensor) -> None:
        """Takes down the loss of a step. On a GPU it waits for it, so that the time of a step is that of its work."""
        self.losses[self.phase].append(loss.item())

    def _look_at_memory(self) -> None:
        steps = sum(map(len, self.seconds.values()))
        if steps <= WARMUP_STEPS:
            self.held = self.memory.held
        if steps == WARMUP_STEPS:
            self.memory.stop_watching()

    def outcome(self, model: nn.Module, figures: Iterable[Figure], texts: dict[str, str] | None = None) -> Outcome:
        """What came of it. Collective: losses are means over ranks, memory the largest of them.

        Args:
            figures: the same on all ranks.
        """
        self.memory.stop_watching()
        peak, held = over_ranks([float(self.memory.peak), float(self.held)], self.device, dist.ReduceOp.MAX)
        seconds = next(iter(self.seconds.values()))
        return Outcome(
            method=self.args.method,
            preset=self.args.preset,
            world_size=dist.get_world_size(),
            device=device_name(self.device),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            losses={phase: mean_over_ranks(losses, self.device) for phase, losses in self.losses.items() if losses},
            step_ms=1e3 * statistics.median(seconds[WARMUP_STEPS:] or seconds or [math.nan]),
            peak_bytes=int(peak),
            held_bytes=int(held),
            figures=list(figures),
            texts=texts or {},
        )


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Collective."""
    return [total / dist.get_world_size() for total in over_ranks(values, device, dist.ReduceOp.SUM)]


def over_ranks(values: list[float], device: torch.device, operation: dist.ReduceOp.RedOpType) -> list[float]:
    """Collective."""
    result = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(result, operation)
    return [float(value) for value in result.cpu()]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class Shown:
    """Shows a step of a phase: a bar on a terminal, else a line now and then; on rank 0 alone."""

    def __init__(self, bars: Progress, phase: str, end: int) -> None:
        self.bars, self.phase, self.end = bars, phase, end
        self.bar = bars.add_task(phase, total=end, loss="")
        self.speaks = dist.get_rank() == 0 and not bars.console.is_terminal

    def __call__(self, step: int, loss: float | None) -> None:
        text = "" if loss is None else f"loss {loss:.3f}"
        self.bars.update(self.bar, completed=step + 1, loss=text)
        if self.speaks and (step + 1) % max(1, self.end // LINES) == 0:
            print(f"{self.phase}: step {step + 1}/{self.end}  {text}", flush=True)


@contextmanager
def progress(phase: str, end: int) -> Iterator[Shown]:
    console = Console()
    columns = TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shows_bars(console)) as bars:
        yield Shown(bars, phase, end)


def shows_bars(console: Console) -> bool:
    return console.is_terminal and dist.get_rank() == 0
