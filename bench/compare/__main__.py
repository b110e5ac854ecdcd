"""Compare ways to train data-parallel: time, memory, traffic and losses.

    python -m bench.compare --model gpt-34m --world-sizes 2 4
    python -m bench.compare --sweep parameters --methods "DDP, bucket views" "zeroopt stage 2"
    python -m bench.compare --budget-mb 400 --width 256

Every method trains the same GPT from the same seed on the same data with AdamW, in processes of its own, in turn and in several
rounds. Options that take several values make a sweep: each combination is compared, and curves are drawn; --sweep names one
with values that are worth looking at. With --budget-mb, the largest model is looked for that trains in so much memory: the
width stays, the number of layers is found by trying.

Writes the figures of all runs to --out, and report.md and pictures beside it; `python -m bench.report` makes those anew. What
is not installed (DeepSpeed, fairscale) is a row that says so.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench.compare.budget import search
from bench.compare.methods import METHODS, chosen_methods
from bench.compare.results import Results, render, write_results
from bench.compare.rounds import Effort, run_rounds
from bench.compare.setting import PRECISIONS, SHAPES, Setting, shape_of
from bench.compare.summary import summarize
from bench.compare.sweep import AXES, that_fit


def main() -> int:
    """1 when a method has failed, or its losses are not those of the others."""
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 240)
    results = measure(args, console)
    write_results(args.out, results)
    render(args.out, console)
    rows = [row for comparison in summarize(results.runs) for row in comparison.rows]
    return int(any(row.failed for row in rows) or any(search.failed for search in results.searches))


def measure(args: argparse.Namespace, console: Console) -> Results:
    methods = chosen_methods(args.methods)
    settings = that_fit(settings_of(args)) if args.sweep else settings_of(args)
    if args.budget_mb is None:
        effort = Effort(args.rounds, args.steps, args.interval, args.timeout)
        return Results(runs=run_rounds(settings, methods, effort, console))
    searches = [search(setting, methods, args.budget_mb, args.interval, args.timeout, console) for setting in settings]
    return Results(searches=searches)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """All combinations of the options that take several values."""
    return [
        Setting(
            *shape_in(model, args),
            vocabulary=args.vocabulary,
            tokens=tokens,
            accumulation=args.accumulation,
            precision=args.precision,
            checkpointing=args.checkpointing,
            bucket_mb=bucket_mb,
            world_size=world_size,
            threads=args.threads,
            device=args.device,
        )
        for model, world_size, tokens, bucket_mb in itertools.product(
            args.model, args.world_sizes, args.tokens, args.bucket_mb or [None]
        )
    ]


def shape_in(model: str, args: argparse.Namespace) -> tuple[int, int]:
    layers, width = shape_of(model, args.vocabulary)
    return args.layers or layers, args.width or width


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", default=["gpt-34m"], metavar="MODEL", help=f"{', '.join(SHAPES)}, or a size such as 5M"
    )
    parser.add_argument("--layers", type=int, help="instead of the model's")
    parser.add_argument("--width", type=int, help="instead of the model's; a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="of a rank's micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2], metavar="N")
    parser.add_argument("--bucket-mb", type=float, nargs="+", help="MiB of a bucket, for all methods that have some")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, block by block, for all methods")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parser.add_argument("--methods", nargs="+", default=[""], metavar="TEXT", help="a name, or what it contains")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--interval", type=float, default=0.01, help="seconds between two looks at the ranks' memory")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one method in one round")
    parser.add_argument("--out", type=Path, default=Path("runs/compare/results.json"))
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sweep", choices=AXES, help="over values of its own, as far as the machine's memory goes")
    kind.add_argument("--budget-mb", type=float, help="millions of bytes a rank, beyond a rehearsal with a tiny model")
    args = parser.parse_args()
    if args.sweep:
        setattr(args, AXES[args.sweep].option, AXES[args.sweep].values)
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not chosen_methods(args.methods):
        parser.error(f"no method's name contains {' or '.join(args.methods)}; there are: {'; '.join(METHODS)}")
    try:
        settings = settings_of(args)
    except ValueError as error:
        parser.error(str(error))
    if args.device == "cuda" and max(setting.world_size for setting in settings) > torch.cuda.device_count():
        parser.error(f"expected a CUDA device for each rank, found {torch.cuda.device_count()}: lower --world-sizes")


if __name__ == "__main__":
    sys.exit(main())
