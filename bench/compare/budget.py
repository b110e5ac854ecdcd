"""The largest model that trains in so many bytes a rank: `python -m bench.compare.budget --budget-mb 400`.

For each method, the number of layers is found by bisection; a model fits when the ranks, training it, held no more than that
together, by their number, at any moment (as `bench.memory` counts). Beside it stands how many times larger than DDP's that is,
measured and by the formula, and what the formula says of 64 and 1024 ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.compare.launch import run_method
from bench.compare.methods import DDP, METHODS
from bench.compare.rank import Job
from bench.compare.rounds import chosen_methods
from bench.compare.setting import PRECISIONS, Setting
from bench.compare.summary import row_of
from bench.launch import write_report

MANY_RANKS = (64, 1024)


@dataclass(frozen=True)
class Largest:
    """What one method can train.

    Attributes:
        problem: why it could not be found out; None where it could.
        layers: 0 where not even one fits.
        tried: bytes a rank by number of layers.
        formula: bytes a parameter, by number of ranks.
    """

    method: str
    problem: str | None
    layers: int
    parameters: int
    tried: dict[int, float]
    formula: dict[int, float]


class NoFigures(Exception):
    """A run has failed; its text says why."""


def find_largest(method: str, setting: Setting, budget: float, measure: Callable[[str, Setting], float]) -> Largest:
    """By bisection over `setting.layers`, up to four times as many as the formula lets expect.

    Args:
        measure: bytes a rank; raises `NoFigures`.
    """
    formula = {n: METHODS[method].formula(replace(setting, world_size=n)) for n in (setting.world_size, *MANY_RANKS)}
    tried: dict[int, float] = {}

    def fits(layers: int) -> bool:
        tried[layers] = measure(method, replace(setting, layers=layers))
        return tried[layers] <= budget

    try:
        layers = last_that(fits, expected_layers(setting, budget / formula[setting.world_size]))
    except NoFigures as failure:
        return Largest(method, str(failure), 0, 0, tried, formula)
    parameters = replace(setting, layers=layers).parameters if layers else 0
    return Largest(method, None, layers, parameters, tried, formula)


def expected_layers(setting: Setting, parameters: float) -> int:
    """How many there are in a model of so many parameters."""
    one, two = (replace(setting, layers=layers).parameters for layers in (1, 2))
    return max(1, int((parameters - one) / (two - one)) + 1)


def last_that(fits: Callable[[int], bool], expected: int) -> int:
    """The largest number from 1 to four times the expected one that fits, if all below it do; 0 where none does."""
    low, high = 0, 4 * expected + 1  # low fits, high does not
    probe = expected
    while high - low > 1:
        if fits(probe):
            low = probe
        else:
            high = probe
        probe = (low + high) // 2
    return low


def measured_bytes(method: str, setting: Setting, timeout_s: float) -> float:
    """Of a rank at the peak, of device memory where there is any."""
    run = run_method(Job(method, setting, steps=0, timeline=False), interval_s=0.005, timeout_s=timeout_s)
    row = row_of([run])
    held = row.pss_bytes if row.device_bytes is None else row.device_bytes
    if held is None:
        raise NoFigures(row.problem)
    return held


def make_table(found: list[Largest], world_size: int, budget_mb: float) -> Table:
    table = Table(title=f"The largest model in {budget_mb:g} MB a rank, {world_size} ranks", box=box.SIMPLE)
    table.add_column("method", no_wrap=True)
    headings = ["layers", "M parameters", "times DDP's", "by formula", *[f"{n} ranks, by formula" for n in MANY_RANKS]]
    for heading in headings:
        table.add_column(heading, justify="right")
    baseline = next((largest for largest in found if largest.method == DDP and largest.parameters), None)
    for largest in found:
        if largest.problem is not None:
            table.add_row(f"{largest.method}: {largest.problem}")
            continue
        times = [f"{baseline.formula[n] / largest.formula[n]:.2f}" if baseline else "" for n in largest.formula]
        ratio = f"{largest.parameters / baseline.parameters:.2f}" if baseline else ""
        table.add_row(largest.method, str(largest.layers), f"{largest.parameters / 1e6:.2f}", ratio, *times)
    return table


def main() -> int:
    args = parse_arguments()
    setting = Setting(
        layers=1,
        width=args.width,
        vocabulary=args.vocabulary,
        tokens=args.tokens,
        accumulation=1,
        precision=args.precision,
        bucket_mb=args.bucket_mb,
        world_size=args.world_size,
        threads=args.threads,
        device=args.device,
    )
    console = Console(width=None if sys.stdout.isatty() else 160)

    def measure(method: str, setting: Setting) -> float:
        held = measured_bytes(method, setting, args.timeout)
        console.print(f"{method}, {setting.layers} layers: {held / 1e6:.1f} MB", highlight=False)
        return held

    found = [find_largest(method, setting, args.budget_mb * 1e6, measure) for method in chosen_methods(args.methods)]
    console.print(make_table(found, args.world_size, args.budget_mb))
    if args.out:
        report = {
            "budget_mb": args.budget_mb,
            "setting": asdict(setting),
            "largest": [asdict(entry) for entry in found],
        }
        write_report(args.out, "bench.compare.budget", report)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare.budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-mb", type=float, required=True, help="millions of bytes a rank, beyond a rehearsal")
    parser.add_argument("--methods", nargs="+", default=[""], metavar="TEXT", help="whose name contains one of these")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--bucket-mb", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
