"""Does a way to train that loses something still come to the loss that DistributedDataParallel comes to?

    python -m bench.quality --tasks text --methods DDP "bfloat16 gradients" --seeds 0 1 2

Runs of one seed have the same start and the same batches with every method. So what a method does to the loss is the mean, over the
seeds, of its loss less DDP's with the same seed; and it is lost in what chance does where that is less than how far the seeds of
DDP are apart. Losses are those of validation, in nats a character.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.launch import Plan, run_ranks, write_report
from bench.quality.methods import BASELINE, METHODS
from bench.quality.tasks import TASKS
from bench.quality.training import Run, train

Losses = dict[str, list[float]]  # by method, seed by seed


@dataclass(frozen=True)
class Verdict:
    """A method beside the baseline.

    Attributes:
        difference: of the means of their losses.
        spread: how far the seeds of the baseline are apart.
    """

    difference: float
    spread: float

    @property
    def is_within(self) -> bool:
        return self.difference <= self.spread


def judge(losses: Losses, method: str) -> Verdict:
    baseline = losses[BASELINE]
    return Verdict(statistics.fmean(losses[method]) - statistics.fmean(baseline), spread=max(baseline) - min(baseline))


def main() -> int:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    report = {}
    for task in args.tasks:
        losses: Losses = {method: [] for method in dict.fromkeys((BASELINE, *args.methods))}
        for seed in args.seeds:
            for method, of_seeds in losses.items():
                of_ranks = run_ranks(Plan(args.world_size, threads=1), train, Run(task, method, seed, args.steps))
                of_seeds.append(statistics.fmean(of_ranks))
                console.print(f"{task}, seed {seed}, {method}: {of_seeds[-1]:.4f}", highlight=False)
        console.print(make_table(task, losses, args))
        report[task] = {
            method: {"losses": of_seeds, **vars(judge(losses, method))} for method, of_seeds in losses.items()
        }
    if args.out:
        write_report(args.out, "bench.quality", {"results": report})
    return 0


def make_table(task: str, losses: Losses, args: argparse.Namespace) -> Table:
    title = f"{task}: {args.steps or TASKS[task].steps} steps on {args.world_size} ranks"
    spread = judge(losses, BASELINE).spread
    caption = f"less {BASELINE}'s: of the means over seeds; seeds of {BASELINE} are {spread:.4f} apart"
    table = Table(title=title, caption=caption, box=box.SIMPLE)
    for heading in ("method", *(f"seed {seed}" for seed in args.seeds), f"less {BASELINE}'s", "within the spread"):
        table.add_column(heading)
    for method, of_seeds in losses.items():
        verdict = judge(losses, method)
        within = "" if method == BASELINE else "yes" if verdict.is_within else "NO"
        table.add_row(method, *(f"{loss:.4f}" for loss in of_seeds), f"{verdict.difference:+.4f}", within)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
