"""Step time of zeroopt's transports against DistributedDataParallel and against a run without communication.

    python -m bench.steps --world-size 2
    python -m bench.steps --world-size 2 --compile blocks
    python -m bench.steps --micro-batches 4 --methods "stage 2" "stage 2, micro_batches"

All methods live side by side in the same processes and take turns, a few steps at a time, so that a busy moment of the
machine favours none of them. Every method trains its own copy of a GPT with AdamW in float32. Prints a table; --out writes
the figures as JSON.

The bound is what a step would take if communication were free: forward and backward of the run without communication, and
its optimizer's time divided by the number of ranks.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zeroopt
from bench.launch import Plan, run_ranks, write_report
from bench.model import count_parameters, make_model

VOCABULARY = 8192
LOCAL = "no communication"
DDP = "DDP"
SAME_BITS = "micro_batches"  # those of this name get the option
DEAF = "deaf"  # those of this name hear of no signals while they wait for the backend, and need no thread for that
Wrapped = tuple[nn.Module, torch.optim.Optimizer]
Times = dict[str, list[float]]  # seconds of each step: "step_s", "optimizer_s" and "cpu_s"


def alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> Wrapped:
    return model, optimizer


def ddp(model: nn.Module, optimizer: torch.optim.Optimizer) -> Wrapped:
    return DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer


def zero(**options: Any) -> Callable[..., Wrapped]:
    return lambda model, optimizer, **further: zeroopt.wrap(model, optimizer, **options, **further)


METHODS: dict[str, Callable[..., Wrapped]] = {
    LOCAL: alone,
    DDP: ddp,
    "stage 1": zero(stage=1),
    "stage 2": zero(stage=2),
    "stage 2, overlap=False": zero(stage=2, overlap=False),
    "stage 2, share_parameters": zero(stage=2, share_parameters=True),
    f"stage 2, {SAME_BITS}": zero(stage=2),
    "stage 2, max_grad_norm": zero(stage=2, max_grad_norm=1.0),
    f"stage 2, max_grad_norm, {SAME_BITS}": zero(stage=2, max_grad_norm=1.0),
    "stage 2, pairwise": zero(stage=2, transport="pairwise"),
    "stage 2, pairwise, overlap=False": zero(stage=2, transport="pairwise", overlap=False),
    f"stage 2, pairwise, {DEAF}": zero(stage=2, transport="pairwise"),
}


@dataclass
class Contestant:
    """One method's model, and what its steps took on this rank."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    micro_batches: int
    is_deaf: bool = False
    step_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def run(self, tokens: Tensor, targets: Tensor, steps: int) -> None:
        with patch("zeroopt.collectives.pending.wait_patiently", _wait) if self.is_deaf else nullcontext():
            self._run(tokens, targets, steps)

    def _run(self, tokens: Tensor, targets: Tensor, steps: int) -> None:
        no_sync = getattr(self.model, "no_sync", nullcontext)
        for _ in range(steps):
            cpu, start = time.process_time(), time.perf_counter()
            for left in reversed(range(self.micro_batches)):
                with no_sync() if left else nullcontext():
                    (self.model(tokens, targets) / self.micro_batches).backward()
            stepping = time.perf_counter()
            self.optimizer.step()
            end = time.perf_counter()
            self.optimizer.zero_grad()
            self.optimizer_s.append(end - stepping)
            self.step_s.append(time.perf_counter() - start)
            self.cpu_s.append(time.process_time() - cpu)

    @property
    def times(self) -> Times:
        return {"step_s": self.step_s, "optimizer_s": self.optimizer_s, "cpu_s": self.cpu_s}

    def forget(self) -> None:
        for seconds in self.times.values():
            seconds.clear()


def work(args: argparse.Namespace) -> dict[str, Times]:
    """What every rank does. By method."""
    contestants = {name: enter(name, args) for name in args.methods}
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(VOCABULARY, (1, args.tokens + 1), generator=generator)
    for round_number in range(args.rounds + 1):
        for contestant in contestants.values():
            dist.barrier()
            contestant.run(tokens[:, :-1], tokens[:, 1:], args.steps)
            if round_number == 0:  # buffers are made in the first steps
                contestant.forget()
    return {name: contestant.times for name, contestant in contestants.items()}


def enter(name: str, args: argparse.Namespace) -> Contestant:
    torch.manual_seed(0)
    net = make_model(VOCABULARY, args.tokens, args.layers, args.width)
    if args.compile == "blocks":
        for block in net.blocks:
            block.compile()
    further = {"micro_batches": args.micro_batches} if SAME_BITS in name else {}
    model, optimizer = METHODS[name](net, torch.optim.AdamW(net.parameters(), fused=True), **further)
    if args.compile == "whole":
        model = torch.compile(model)  # type: ignore[assignment]
    return Contestant(model, optimizer, args.micro_batches, DEAF in name)


def _wait(wait: Callable[[], Any]) -> Any:
    return wait()


@dataclass
class Figures:
    """One method's medians over steps: seconds, the mean over ranks; CPU seconds, the sum over ranks."""

    step_s: float
    optimizer_s: float
    cpu_s: float


def summarize(ranks: list[dict[str, Times]]) -> dict[str, Figures]:
    results = {}
    for name in ranks[0]:
        medians = [{key: statistics.median(values) for key, values in rank[name].items()} for rank in ranks]
        results[name] = Figures(
            statistics.fmean(m["step_s"] for m in medians),
            statistics.fmean(m["optimizer_s"] for m in medians),
            sum(m["cpu_s"] for m in medians),
        )
    return results


def bound_s(local: Figures, world_size: int) -> float:
    return local.step_s - local.optimizer_s * (1 - 1 / world_size)


def make_table(results: dict[str, Figures], parameters: int, args: argparse.Namespace) -> Table:
    table = Table(
        title=f"{parameters / 1e6:.1f} M parameters, {args.world_size} ranks, {args.tokens} tokens a rank"
        + (f" in each of {args.micro_batches} micro-batches" if args.micro_batches > 1 else "")
        + (f", compiled: {args.compile}" if args.compile else ""),
        box=box.SIMPLE,
    )
    table.add_column("method", no_wrap=True)
    for heading in ("step\nms", "of DDP's", "of the\nbound", "CPU s\na step", "of DDP's"):
        table.add_column(heading, justify="right", no_wrap=True)
    bound = bound_s(results[LOCAL], args.world_size) if LOCAL in results else None
    baseline = results.get(DDP)
    if bound is not None:
        ratio = "" if baseline is None else f"{bound / baseline.step_s:.2f}"
        table.add_row("(the bound)", f"{1e3 * bound:.0f}", ratio, "1.00", "", "")
    for name, figures in results.items():
        table.add_row(
            name,
            f"{1e3 * figures.step_s:.0f}",
            "" if baseline is None else f"{figures.step_s / baseline.step_s:.2f}",
            "" if bound is None else f"{figures.step_s / bound:.2f}",
            f"{figures.cpu_s:.2f}",
            "" if baseline is None else f"{figures.cpu_s / baseline.cpu_s:.2f}",
        )
    return table


def main() -> int:
    args = parse_arguments()
    results = summarize(run_ranks(Plan(args.world_size, args.threads), work, args))
    parameters = count_parameters(VOCABULARY, args.tokens, args.layers, args.width)
    Console().print(make_table(results, parameters, args))
    if args.out:
        figures_by_method = {name: vars(value) for name, value in results.items()}
        write_report(args.out, "bench.steps", {"parameters": parameters, "results": figures_by_method})
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8, help="turns of every method, after one that does not count")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="tokens a rank and micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="a rank and step, accumulated under no_sync()")
    parser.add_argument(
        "--compile", choices=("whole", "blocks"), help="what torch.compile is given, of every method's model"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
