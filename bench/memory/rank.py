"""A case, and what a rank does with it while it is watched: build a model, wrap it, maybe load a checkpoint, train.

Nothing is rehearsed, and nothing is asked of the allocator: a rank is a process that has imported torch, zeroopt and transformers
and has joined its group, and then runs a user's script.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import zeroopt.checkpoint
from bench.compare.peak import status_bytes
from bench.memory.loops import LOOPS
from bench.memory.methods import METHODS, Method
from bench.memory.models import MODELS, Inputs, Model
from bench.watch import Watch


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model, method, loop: among `MODELS`, `METHODS` and `LOOPS`.
        after_load: a checkpoint is loaded before the first step.
        threads: CPU threads a rank.
    """

    model: str
    method: str
    world_size: int = 2
    loop: str = "plain"
    after_load: bool = False
    steps: int = 4
    threads: int = 1

    @property
    def precision(self) -> str:
        return METHODS[self.method].precision

    def why_not(self) -> str | None:
        return MODELS[self.model].why_not() or METHODS[self.method].why_not()


@dataclass(frozen=True)
class Told:
    """What a rank tells.

    Attributes:
        phases: when each began, by `time.monotonic`, and its name.
        own_peak: bytes above those at the beginning, by the kernel's own mark. Pages that ranks share count in full.
    """

    phases: list[tuple[float, str]]
    own_peak: int


def write_checkpoint(case: Case, path: Path) -> None:
    """For ranks that load it. They are other processes, whose memory this one does not shape."""
    model, optimizer = METHODS[case.method].prepare(MODELS[case.model].make())
    train(case, model, optimizer, [], steps=1)
    zeroopt.checkpoint.save(path, model, optimizer)  # type: ignore[arg-type]


def work(case: Case, checkpoint: Path | None, watch: Watch) -> Told:
    """What every rank does."""
    watch.begin()
    own_before = own_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark starts again from what is resident now (proc(5))
    phases: list[tuple[float, str]] = []
    model, optimizer = prepare(MODELS[case.model], METHODS[case.method], checkpoint, phases)
    train(case, model, optimizer, phases, case.steps)
    own_peak = own_bytes("VmHWM") - own_before
    watch.end()
    return Told(phases, own_peak)


def prepare(model: Model, method: Method, checkpoint: Path | None, phases: list[tuple[float, str]]) -> Any:
    mark(phases, "build")
    torch.manual_seed(0)
    with torch.device("meta") if method.on_meta else nullcontext():
        net = model.make()
    dist.barrier()  # so that none wraps while another one still builds
    mark(phases, "wrap")
    trained = method.prepare(net)
    if checkpoint is not None:
        mark(phases, "load")
        zeroopt.checkpoint.load(checkpoint, *trained)  # type: ignore[arg-type]
    return trained


def train(
    case: Case, model: torch.nn.Module, optimizer: torch.optim.Optimizer, phases: list[tuple[float, str]], steps: int
) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())

    def draw() -> Inputs:
        return MODELS[case.model].inputs(generator)

    for number in range(steps):
        LOOPS[case.loop](
            model,
            optimizer,
            draw,
            lambda phase, first=number == 0: mark(phases, f"first {phase}" if first else "later steps"),  # type: ignore[misc]
        )


def mark(phases: list[tuple[float, str]], phase: str) -> None:
    phases.append((time.monotonic(), phase))


def own_bytes(field: str) -> int:
    """Of this process, without mapped files, whose pages come into it as code is first run."""
    return status_bytes(field) - status_bytes("RssFile")
