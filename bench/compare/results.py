"""What a comparison leaves behind: the runs as JSON, and everything that is made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.compare.launch import Run, run_from
from bench.compare.summary import summarize
from bench.compare.table import make_markdown, make_table
from bench.launch import write_report


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """With the rows that come of them, for who reads the file without this package."""
    rows = [asdict(row) for comparison in summarize(runs) for row in comparison.rows]
    write_report(path, "bench.compare", {"rows": rows, "runs": [asdict(run) for run in runs]})


def read_runs(path: Path) -> tuple[list[Run], dict[str, Any]]:
    """The runs, and the report that they stand in."""
    report = json.loads(path.read_text())
    return [run_from(fields) for fields in report["runs"]], report


def render(path: Path, console: Console) -> None:
    """Print the tables of a file of results, and write report.md and pictures beside it."""
    runs, report = read_runs(path)
    comparisons = summarize(runs)
    for comparison in comparisons:
        console.print(make_table(comparison))
    machine = report["machine"]
    facts = [f"`{report['command']}`", f"{machine['cores']} cores, {machine['cpu']}", f"torch {machine['torch']}"]
    markdown = path.with_name("report.md")
    markdown.write_text(make_markdown(comparisons, facts))
    written = [markdown]
    if find_spec("matplotlib") is None:
        console.print("matplotlib is not installed: no pictures")
    else:
        from bench.compare.plots import draw_all

        written += draw_all(comparisons, runs, path.parent)
    console.print(f"Written: {', '.join(map(str, [path, *written]))}", soft_wrap=True, highlight=False)
