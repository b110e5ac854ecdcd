"""What training holds, in bytes a parameter, phase by phase, with AdamW: models, methods and numbers of ranks.

    python -m bench.memory --models gpt-98m gpt2-82m --methods DDP "stage 2" --world-sizes 2 4

Each row is a run in processes of its own, which are as `torchrun` starts them: nothing is set in the environment but the number of
threads, nothing is asked of the allocator, and nothing is rehearsed. From the building of the model on, this process asks the
kernel every 20 ms what they hold. A page of memory that k ranks share counts 1/k in each of them, so that over all ranks it
counts once. Mapped files do not count: they are the code of libraries, which ranks share with whatever else runs. Figures are
above what the ranks held when they had imported torch, zeroopt and transformers and had started their group.

    peak       the most that all ranks held at one moment from wrapping on, by their number
    held       after the last step
    formula    parameters, gradients, masters and moments alone
    beyond     what the peak is above that, less what "SGD alone" holds beyond its parameters and gradients at its own peak, if
               that is measured: activations, and what libraries keep

"SGD alone" is plain SGD without communication. Its gradients are set to zero rather than freed, so that whatever comes and
goes is beyond them: activations, and the gradient that autograd is making. What is freed counts for as long as the C library
keeps it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.launch import write_report
from bench.memory.loops import LOOPS
from bench.memory.measure import INTERVAL_S, PHASES, Measured, measure
from bench.memory.methods import METHODS
from bench.memory.models import MODELS
from bench.memory.rank import Case

ALONE = {"float32": "SGD alone", "bfloat16": "SGD alone, bfloat16"}


def main() -> int:
    """1 when a row has failed that could have run."""
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 240)
    rows: list[Measured] = []
    for case in cases_of(args):
        rows.append(measure(case, args.interval))
        console.print(line_of(rows[-1], rows), markup=False, highlight=False, soft_wrap=True)
    console.print(make_table(rows))
    if args.out:
        write_report(args.out, "bench.memory", {"rows": [report(row) for row in rows]})
    return int(any(row.problem and not row.case.why_not() for row in rows))


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All combinations; what needs no other ranks is run once a model, on one."""
    combinations = itertools.product(args.models, args.methods, args.world_sizes, args.loops)
    cases = [
        Case(model, method, world_size, loop, args.after_load, args.steps, args.threads)
        if METHODS[method].communicates
        else Case(model, method, 1, "gradients set to zero", steps=args.steps, threads=args.threads)
        for model, method, world_size, loop in combinations
    ]
    return list(dict.fromkeys(cases))


def beyond(row: Measured, rows: list[Measured]) -> float | None:
    """Bytes a parameter; None where it was not measured what SGD alone holds."""
    if not METHODS[row.case.method].communicates:
        return row.a_parameter(row.own_peak) - row.formula
    for other in rows:
        if (other.case.model, other.case.method) == (row.case.model, ALONE[row.case.precision]):
            return row.a_parameter(row.peak) - row.formula - (other.a_parameter(other.own_peak) - other.formula)
    return None


def cells(row: Measured, rows: list[Measured]) -> list[str]:
    case = row.case
    names = [case.model, case.method, str(case.world_size), case.loop + (", after a load" if case.after_load else "")]
    if row.problem is not None:
        return [*names, row.problem.splitlines()[0]]
    more = beyond(row, rows)
    figures = [row.a_parameter(row.peak), row.a_parameter(row.held), row.formula]
    by_phase = [f"{row.a_parameter(row.peaks[phase]):.2f}" if phase in row.peaks else "" for phase in PHASES]
    return [
        *names,
        *(f"{figure:.2f}" for figure in figures),
        "" if more is None else f"{more:.2f}",
        row.peak_phase,
        *by_phase,
    ]


def line_of(row: Measured, rows: list[Measured]) -> str:
    headings = ("", "", "ranks ", "", "peak ", "held ", "formula ", "beyond ", "in ")
    return "; ".join(heading + cell for heading, cell in zip(headings, cells(row, rows), strict=False))


def make_table(rows: list[Measured]) -> Table:
    table = Table(caption="bytes a parameter and rank, above what was held before the model was built", box=box.SIMPLE)
    for heading in ("model", "method", "ranks", "loop", "peak", "held", "formula", "beyond", "peak in", *PHASES):
        table.add_column(heading)
    for row in rows:
        table.add_row(*cells(row, rows))
    return table


def report(row: Measured) -> dict[str, object]:
    figures = {"peak": row.peak, "peak_phase": row.peak_phase, "formula": row.formula} if row.problem is None else {}
    return {**vars(row), "case": vars(row.case), **figures}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = ["SGD alone", "DDP", "ZeroRedundancyOptimizer", "stage 0", "stage 1", "stage 2", "stage 2, shared"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt-98m"], metavar="MODEL")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=chosen, metavar="METHOD")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2], metavar="N")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=["plain"], metavar="LOOP")
    parser.add_argument("--after-load", action="store_true", help="load a checkpoint before the first step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help="seconds between two looks at the ranks")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
