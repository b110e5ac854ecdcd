"""Hours of a training's changes in minutes: steps, saves, loads, wraps and losses of ranks, without growing.

Ranks train a small model, save it in both ways, load it and wrap it anew, round after round, and note after each round what memory,
descriptors and threads they hold. Several times one of them is killed; the others have to end by their own error, and new ones go on
from the checkpoint. The exit code is 1 where something has grown, within a life of the ranks or in what they leave on the machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import zeroopt
from bench.launch import Plan, RankFailed, Ranks, running_ranks, write_report
from zeroopt.checkpoint import async_save, latest, load, save

STEPS = 40  # a round
LIVES = 3  # of which all but the last end by a killed rank
LEAST_ROUNDS = 8  # of the last life
SHOWN = 8  # moments of a life
GRACE_S = 60.0  # in which those that were not killed end by themselves
LIMIT_S = 300.0  # of what comes after the time of a life
RELATIVE_GROWTH = 0.02  # of memory, between the second quarter of a life and the last: what an allocator may do
GROWTH_BYTES = 4 << 20


class Held(NamedTuple):
    """What a process holds. `memory`: bytes that are resident."""

    memory: int
    descriptors: int
    threads: int


class Life(NamedTuple):
    """What one rank has done, and what it held after each round."""

    steps: int
    held: list[Held]


@dataclass(frozen=True)
class Task:
    """What to train. `seconds`: after which the ranks of the last life return; in the others one of them is killed."""

    folder: Path
    life: int
    seconds: float
    options: dict[str, Any]

    @property
    def is_last(self) -> bool:
        return self.life == LIVES - 1


def held_by(pid: int) -> Held:
    """By a process of this machine."""
    here = Path(f"/proc/{pid}")
    resident = int((here / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Held(resident, len(os.listdir(here / "fd")), len(os.listdir(here / "task")))


def train(task: Task) -> Life:
    """One rank's life, whose rounds are as many on all ranks; without a kill in it."""
    torch.manual_seed(0)
    end, steps = time.monotonic() + task.seconds, 0
    held: list[Held] = []
    plain: nn.Module = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    plain_optimizer: torch.optim.Optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    while True:
        model, optimizer = zeroopt.wrap(plain, plain_optimizer, **task.options)
        if (saved := latest(task.folder)) is not None:
            load(saved, model, optimizer)
        for _ in range(STEPS):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        steps += STEPS
        name = f"{task.life}-{len(held)}"
        async_save(task.folder / f"{name}-behind", model, optimizer, keep=2).result()
        save(task.folder / name, model, optimizer, keep=2)
        plain, plain_optimizer = zeroopt.unwrap(model, optimizer)
        held.append(held_by(os.getpid()))
        is_enough = task.is_last and time.monotonic() > end and len(held) >= LEAST_ROUNDS
        over = torch.tensor(float(is_enough))
        dist.broadcast(over, 0)
        if over:
            return Life(steps, held)


def growth(held: Sequence[Held]) -> list[str]:
    """What has grown from the second quarter of a life to the last."""
    quarter = len(held) // 4
    if quarter == 0:
        return [f"nothing is known after {len(held)} rounds"]
    before, after = (list(zip(*part, strict=True)) for part in (held[quarter : 2 * quarter], held[-quarter:]))
    found = []
    for name, early, late in zip(Held._fields, before, after, strict=True):
        allowed = RELATIVE_GROWTH * statistics.median(early) + GROWTH_BYTES if name == "memory" else 0
        if statistics.median(late) > max(early) + allowed:
            found.append(f"{name}: {max(early)} before, {statistics.median(late):.0f} after")
    return found


def lose_one(ranks: Ranks, seconds: float) -> bool:
    """Kill a rank after so many seconds; whether the others have ended by themselves."""
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        ranks.have_returned(within_s=0.5)
    ranks.processes[-1].kill()
    killed_at = time.monotonic()
    for process in ranks.processes:
        process.join(max(0.0, killed_at + GRACE_S - time.monotonic()))
    return not any(process.is_alive() for process in ranks.processes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--out", type=Path, help="write the figures here")
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="zeroopt-soak-"))
    options = {"stage": args.stage, "transport": args.transport}
    shared_before, own, hung, lives = set(os.listdir("/dev/shm")), [], 0, []
    try:
        for life in range(LIVES):
            # Most of the time is the last life's, for what grows slowly.
            seconds = 60 * args.minutes * (0.7 if life == LIVES - 1 else 0.3 / (LIVES - 1))
            task = Task(folder, life, seconds, options)
            plan = Plan(args.world_size, threads=1, timeout_s=seconds + LIMIT_S, quiet=True)
            with running_ranks(plan, train, task) as ranks:
                if task.is_last:
                    lives = ranks.values()
                else:
                    hung += not lose_one(ranks, seconds)
            own.append(held_by(os.getpid()))
            print(f"life {life + 1} of {LIVES}: {own[-1]}, {hung} hung", flush=True)
    except RankFailed as error:
        print(error)
        return 1
    finally:
        shutil.rmtree(folder)
    problems = [f"rank {rank} has grown: {one}" for rank, life in enumerate(lives) for one in growth(life.held)]
    problems += [f"left in /dev/shm: {name}" for name in sorted(set(os.listdir("/dev/shm")) - shared_before)]
    problems += ["ranks hung after a kill"] * (hung > 0)
    figures: dict[str, Any] = {
        "steps": [life.steps for life in lives],
        "rounds": [len(life.held) for life in lives],
        "held": {f"rank {rank}": life.held[:: max(len(life.held) // SHOWN, 1)] for rank, life in enumerate(lives)},
        "problems": problems,
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.out:
        write_report(args.out, "bench.soak", figures)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
