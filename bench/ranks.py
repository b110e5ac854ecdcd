"""What grows with the number of ranks: time to wrap, a step, and the pieces of shared memory that a rank has mapped.

    python -m bench.ranks --world-sizes 2 8 32 64

A small model in many buckets, so that hardly anything is computed or copied: what is left are messages, tickets and mappings. All
ranks are on this machine, mostly more of them than it has cores, so that the figures compare methods, and say little of others.
DistributedDataParallel has as many buckets.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zeroopt
from bench.launch import Plan, run_ranks, write_report

WIDTH = 139
BUCKET_MB = 0.08  # of one layer
METHODS = ("DDP", "shm", "pairwise")
MAPPED = "/memfd:zeroopt"  # what /proc calls zeroopt's shared memory

Figures = dict[str, float]


def work(method: str, args: argparse.Namespace) -> Figures:
    """What every rank does."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(args.layers)))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters())
    model: nn.Module
    dist.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    if method == "DDP":
        model = DistributedDataParallel(net, bucket_cap_mb=BUCKET_MB)
    else:
        model, optimizer = zeroopt.wrap(net, optimizer, args.stage, bucket_mb=BUCKET_MB, transport=method)
    wrap_cpu = time.process_time() - cpu
    dist.barrier()
    wrap = time.perf_counter() - begin
    steps = [step(model, optimizer) for _ in range(args.steps)]
    return {
        "wrap_s": wrap,
        "wrap_cpu_s": wrap_cpu,
        "first_step_s": steps[0],
        "step_s": statistics.median(steps[1:]),
        "mapped": float(sum(MAPPED in line for line in Path("/proc/self/maps").read_text().splitlines())),
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Seconds until the last rank is through."""
    dist.barrier()
    begin = time.perf_counter()
    model(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.barrier()
    return time.perf_counter() - begin


def make_table(results: dict[str, dict[str, Figures]], args: argparse.Namespace) -> Table:
    table = Table(title=f"{args.layers} buckets, stage {args.stage}", box=box.SIMPLE)
    for heading in ("ranks", "", "wrap s", "CPU ms\na rank", "first\nstep ms", "step\nms", "pieces\nmapped"):
        table.add_column(heading, justify="right", no_wrap=True)
    for world_size, methods in results.items():
        for method, figures in methods.items():
            in_ms = [f"{1e3 * figures[name]:.1f}" for name in ("wrap_cpu_s", "first_step_s", "step_s")]
            table.add_row(world_size, method, f"{figures['wrap_s']:.3f}", *in_ms, f"{figures['mapped']:.0f}")
    return table


def main() -> int:
    args = parse_arguments()
    results: dict[str, dict[str, Figures]] = {}
    for world_size in args.world_sizes:
        results[str(world_size)] = {
            method: run_ranks(Plan(world_size, 1), work, method, args)[0] for method in args.methods
        }
    Console().print(make_table(results, args))
    if args.out:
        write_report(args.out, "bench.ranks", {"layers": args.layers, "stage": args.stage, "results": results})
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--layers", type=int, default=12, help="of the model, each a bucket")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="the first of which plans buckets anew")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
