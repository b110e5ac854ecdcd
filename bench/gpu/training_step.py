"""A training step of a GPT, method by method, each on ranks of its own: `python -m bench.gpu.training_step --shape gpt-350m`.

A rank is a process with a GPU to itself. With one rank, too, buckets go through the backend's collectives (NCCL), on streams of
their own, as they do with many. Figures of each method are written as soon as they are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.compare.clock import make_clock
from bench.gpu.counting import Calls, count_calls
from bench.gpu.methods import DDP, METHODS, SHAPES, Method, Shape
from bench.launch import Plan, RankFailed, run_ranks
from zeroopt.planner import estimate_memory

WARMUP_STEPS = 3  # buffers are made, and buckets planned anew
HOST_STEPS = 5
COUNTED_STEPS = 2
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Held:
    """How many ranks, in which precision; what formulas ask for."""

    world_size: int
    precision: str


@dataclass(frozen=True)
class Figures:
    """What one rank has measured.

    Attributes:
        step_s, optimizer_s: on the device, of each timed step.
        host_s: until the host had begun all of a step, of some that each found the device idle.
        calls: None on the CPU.
        held_bytes: on the device, after a step and `zero_grad`.
        peak_bytes: the most, in any step.
        formula_bytes: parameters, gradients, masters and moments.
        planned_bytes: the peak by `estimate_memory`, which knows nothing of autocast: None with it.
        losses: of each step from the first on.
    """

    step_s: list[float]
    optimizer_s: list[float]
    host_s: list[float]
    calls: Calls | None
    held_bytes: int
    peak_bytes: int
    formula_bytes: float
    planned_bytes: int | None
    losses: list[float]


class Loop:
    """The training loop, the same for all methods."""

    def __init__(self, method: Method, shape: Shape, device: torch.device) -> None:
        net = shape.make_model().to(device)
        self.model, self.optimizer = method.prepare(net)
        self.device, self.autocast = device, partial(method.autocast, device)
        generator = torch.Generator().manual_seed(dist.get_rank())
        drawn = torch.randint(shape.vocabulary, (shape.sequences, shape.tokens + 1), generator=generator)
        self.tokens, self.targets = drawn[:, :-1].to(device), drawn[:, 1:].to(device)
        self.losses: list[Tensor] = []

    def step(self) -> Callable[[], list[float]]:
        """Returns what tells the seconds of forward and backward, and of the optimizer."""
        clock = make_clock(self.device)
        clock.mark()
        with self.autocast():
            loss = self.model(self.tokens, self.targets)
        loss.backward()
        clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark()
        self.losses.append(loss.detach())
        return clock.seconds


def work(method: str, shape: Shape, device_type: str) -> Figures:
    """What a rank does. Collective."""
    device = torch.device(device_type, dist.get_rank()) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return measure(METHODS[method], shape, device)


def measure(method: Method, shape: Shape, device: torch.device) -> Figures:
    """Collective."""
    loop = Loop(method, shape, device)
    for _ in range(WARMUP_STEPS):
        loop.step()
    dist.barrier()
    clocks = [loop.step() for _ in range(shape.steps)]
    seconds = [clock() for clock in clocks]
    on_device = device.type == "cuda"
    held = torch.cuda.memory_allocated(device) if on_device else 0
    peak = torch.cuda.max_memory_allocated(device) if on_device else 0
    return Figures(
        step_s=[sum(parts) for parts in seconds],
        optimizer_s=[optimizer for _, optimizer in seconds],
        host_s=[host_seconds(loop, device) for _ in range(HOST_STEPS)],
        calls=count_calls(loop.step, COUNTED_STEPS) if on_device else None,
        held_bytes=held,
        peak_bytes=peak,
        formula_bytes=method.formula(Held(dist.get_world_size(), method.precision)) * shape.parameters,
        planned_bytes=planned_bytes(method, shape) if method.precision == "bfloat16" else None,
        losses=torch.stack(loop.losses).tolist(),
    )


def planned_bytes(method: Method, shape: Shape) -> int:
    """Of each rank, at the peak. Not collective."""
    with torch.device("meta"):
        net = shape.make_model()
        tokens = torch.zeros(shape.sequences, shape.tokens, dtype=torch.long)
    ranks, options = dist.get_world_size(), {**(method.options or {}), "transport": "all_to_all"}
    plan = estimate_memory(
        net, torch.optim.AdamW, world_size=ranks, device="cuda", sample=(tokens, tokens), compare=False, **options
    )
    return plan.peak


def host_seconds(loop: Loop, device: torch.device) -> float:
    """What the host needs for one step, which then is not through."""
    synchronize(device)
    begin = time.perf_counter()
    loop.step()
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_method(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The first rank's figures, or "problem": why there are none."""
    plan = Plan(arguments.ranks, 1, "nccl" if arguments.device == "cuda" else "gloo", TIMEOUT_S, quiet=True)
    try:
        figures = run_ranks(plan, work, name, SHAPES[arguments.shape], arguments.device)
    except RankFailed as failure:
        print(failure, file=sys.stderr)
        return {"problem": failure.reason}
    return asdict(figures[0])


def main() -> int:
    """1 where a method has failed."""
    arguments = parse_arguments()
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.methods:
        results[name] = run_method(name, arguments)
        step_s = results[name].get("step_s")
        print(name, "failed" if step_s is None else f"{1e3 * statistics.median(step_s):.1f} ms", flush=True)
        if arguments.out:
            shape = SHAPES[arguments.shape]
            report = {"shape": asdict(shape), "parameters": shape.parameters, "ranks": arguments.ranks, "baseline": DDP}
            arguments.out.write_text(json.dumps({**report, "results": results}))
    return int(any("problem" in result for result in results.values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="gpt-350m", choices=SHAPES)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
