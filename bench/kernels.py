"""Speed of every kernel against its memory traffic and against others that do the same; on pytest-benchmark.

    python -m bench.kernels                      # this CPU, on 1 thread and on all
    python -m bench.kernels --only AdamW --gib 0.5
    python -m bench.kernels --device cuda        # percent of what the device copies

The bound is a loop that reads and writes the same arrays with a trivial add (bench/traffic.py); on a CUDA device, a copy of as
many bytes. A kernel, its bound and its rivals take turns, so that a busy moment of the machine favours none; figures are medians.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich import box
from rich.console import Console
from rich.table import Table

from bench.kernel_cases import CASES, Case, Run
from bench.launch import write_report
from bench.traffic import Stream, same_traffic

BOUND = "the same traffic"


def test_kernel(benchmark: BenchmarkFixture, name: str, threads: int, arguments: argparse.Namespace) -> None:
    """One case on so many threads."""
    gc.collect()  # the arrays of the case before
    device = torch.device(arguments.device)
    torch.set_num_threads(threads)
    case = CASES[name](arguments.gib, device)
    others = {BOUND: bound_of(case, device), **case.rivals}
    seconds: dict[str, list[float]] = {rival: [] for rival in others}

    def rivals_turn() -> None:
        for rival, run in others.items():
            start = time.perf_counter()
            run()
            wait(device)
            seconds[rival].append(time.perf_counter() - start)

    def own_turn() -> None:
        case.run()
        wait(device)

    pedantic: Callable[..., None] = benchmark.pedantic
    pedantic(own_turn, setup=rivals_turn, rounds=arguments.rounds, warmup_rounds=1)
    medians = {rival: statistics.median(times[1:]) for rival, times in seconds.items()}
    benchmark.extra_info.update(name=name, threads=threads, bytes=case.nbytes, others=medians, targets=case.targets)


def bound_of(case: Case, device: torch.device) -> Run:
    if device.type != "cpu":
        half = torch.empty(case.nbytes // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(half)
        return lambda: target.copy_(half)
    return in_turn([same_traffic(streams) for streams in alike(case.streams)])


def alike(streams: Sequence[Stream]) -> list[list[Stream]]:
    """Streams that one loop can go through: neighbours of one size; what is read again starts a new pass."""
    loops: list[list[Stream]] = []
    for stream in streams:
        same_size = loops and loops[-1][0].array.numel() == stream.array.numel()
        again = loops and any(stream.array is other.array for other in loops[-1])
        if not same_size or again or len(loops[-1]) == 5:
            loops.append([])
        loops[-1].append(stream)
    return loops


def in_turn(runs: Sequence[Callable[[], None]]) -> Run:
    def run_all() -> None:
        for run in runs:
            run()

    return run_all


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Report:
    """A plugin of pytest: hands the cases out, and prints what came of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.options = arguments
        self.rows: list[dict[str, Any]] = []

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names = [name for name in CASES if any(part.lower() in name.lower() for part in self.options.only)]
        metafunc.parametrize("name", names)
        metafunc.parametrize("threads", self.options.threads)

    @pytest.fixture
    def arguments(self) -> argparse.Namespace:
        return self.options

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for result in session.config._benchmarksession.benchmarks:  # type: ignore[attr-defined]
            if not result.extra_info:  # it failed
                continue
            self.rows.append({**result.extra_info, "seconds": result.stats.median})


def make_table(rows: Sequence[dict[str, Any]], device: str) -> Table:
    bound = "of the same\ntraffic" if device == "cpu" else "of a copy"
    table = Table(title=f"Kernels on {device}", caption="times: how many times as fast as", box=box.SIMPLE)
    for heading, justify in (("", "left"), ("threads", "right"), ("ms", "right"), ("GB/s", "right"), (bound, "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("against others (target)")
    for row in rows:
        others = dict(row["others"])
        ratio = others.pop(BOUND) / row["seconds"]
        rivals = [rival_text(name, seconds / row["seconds"], row["targets"]) for name, seconds in others.items()]
        rate = row["bytes"] / row["seconds"] / 1e9
        milliseconds = f"{1e3 * row['seconds']:.1f}"
        table.add_row(row["name"], str(row["threads"]), milliseconds, f"{rate:.1f}", f"{ratio:.0%}", "\n".join(rivals))
    return table


def rival_text(name: str, ratio: float, targets: dict[str, float]) -> str:
    target = f" ({targets[name]:.1f})" if name in targets else ""
    return f"{ratio:.2f}x {name}{target}"


def main() -> int:
    arguments = parse_arguments()
    report = Report(arguments)
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--benchmark-quiet", "--benchmark-disable-gc"]
    status = pytest.main([str(Path(__file__)), "--rootdir", str(Path(__file__).parent), *options], plugins=[report])
    if not report.rows:
        return int(status) or 1
    Console(width=130 if not sys.stdout.isatty() else None).print(make_table(report.rows, arguments.device))
    if arguments.out:
        write_report(arguments.out, "bench.kernels", {"device": arguments.device, "rows": report.rows})
    return int(status)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}), help="CPU threads")
    parser.add_argument("--gib", type=float, default=1.0, help="size of a kernel's arrays together")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains one of these"
    )
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
