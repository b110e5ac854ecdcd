"""What `zeroopt.estimate_memory` says beside what ranks have held.

    python -m bench.memory --models gpt-98m gpt2-82m --methods "stage 1" "stage 2" --world-sizes 2 4 --out held.json
    python -m bench.planner held.json

Each row of the first command is planned anew, from the model and the options alone. Both figures are bytes a parameter and rank,
from wrapping on, at the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import zeroopt
from bench.launch import write_report
from bench.memory.methods import METHODS
from bench.memory.models import MODELS


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        planned, held: bytes of a rank at the peak.
        planned_in, held_in: the phases of the peaks.
    """

    model: str
    method: str
    world_size: int
    parameters: int
    planned: int
    planned_in: str
    held: float
    held_in: str

    @property
    def error(self) -> float:
        """Of the plan: 0.05 is 5 % too much."""
        return self.planned / self.held - 1


def plan(measured: dict[str, Any]) -> Row | None:
    """None where there is no plan for such a row, or no measurement."""
    case = measured["case"]
    options = METHODS[case["method"]].options
    if options is None or measured["problem"] is not None:
        return None
    model = MODELS[case["model"]]
    net, sample = model.make(), model.inputs(torch.Generator())
    estimate = zeroopt.estimate_memory(
        net, torch.optim.AdamW, world_size=case["world_size"], sample=sample, compare=False, **options
    )
    phases = [phase for phase in estimate.asked.phases if phase.name in PHASES]
    most = max(phases, key=lambda phase: phase.total)
    return Row(
        case["model"],
        case["method"],
        case["world_size"],
        measured["parameters"],
        most.total,
        most.name,
        measured["peak"],
        measured["peak_phase"],
    )


PHASES = (
    "wrapping",
    "first backward",
    "moving",
    "first step",
    "forward and backward",
    "step",
)  # that a row goes through


def make_table(rows: list[Row]) -> Table:
    errors = [row.error for row in rows]
    caption = "no rows"
    if rows:
        mean = sum(map(abs, errors)) / len(rows)
        caption = f"{len(rows)} rows: {mean:.1%} off in the mean, from {min(errors):+.1%} to {max(errors):+.1%}"
    table = Table(caption=caption, box=box.SIMPLE)
    for heading in ("model", "method", "ranks", "planned", "held", "off", "planned in", "held in"):
        table.add_column(heading)
    for row in rows:
        each = [f"{num_bytes / row.parameters:.2f}" for num_bytes in (row.planned, row.held)]
        names = [row.model, row.method, str(row.world_size)]
        table.add_row(*names, *each, f"{row.error:+.1%}", row.planned_in, row.held_in)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.planner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("held", type=Path, nargs="+", help="what `python -m bench.memory --out` has written")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    measured = [row for path in args.held for row in json.loads(path.read_text())["rows"]]
    rows = [row for row in map(plan, measured) if row is not None]
    Console(width=None if sys.stdout.isatty() else 160).print(make_table(rows))
    if args.out:
        write_report(args.out, "bench.planner", {"rows": [{**vars(row), "error": row.error} for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
