"""What a comparison leaves behind: the figures as JSON, and everything that is made of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.compare.budget import Largest, Search
from bench.compare.launch import Run, run_from
from bench.compare.setting import Setting
from bench.compare.summary import summarize
from bench.compare.table import largest_table, make_markdown, make_table
from bench.launch import write_report


@dataclass
class Results:
    """Either of them may be empty."""

    runs: list[Run] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)


def write_results(path: Path, results: Results) -> None:
    """With the rows that come of the runs, for who reads the file without this package."""
    rows = [asdict(row) for comparison in summarize(results.runs) for row in comparison.rows]
    write_report(path, "bench.compare", {"rows": rows, **asdict(results)})


def read_results(path: Path) -> tuple[Results, dict[str, Any]]:
    """The results, and the report that they stand in."""
    report = json.loads(path.read_text())
    runs = [run_from(fields) for fields in report["runs"]]
    return Results(runs, [search_from(fields) for fields in report["searches"]]), report


def search_from(fields: dict[str, Any]) -> Search:
    """From JSON, which has no numbers as keys."""
    found = [
        Largest(
            **{
                **largest,
                **{name: {int(n): value for n, value in largest[name].items()} for name in ("tried", "formula")},
            }
        )
        for largest in fields["found"]
    ]
    return Search(Setting(**fields["setting"]), fields["budget_mb"], found)


def render(path: Path, console: Console) -> None:
    """Print the tables of a file of results, and write report.md and pictures beside it."""
    results, report = read_results(path)
    comparisons = summarize(results.runs)
    for comparison in comparisons:
        console.print(make_table(comparison))
    for search in results.searches:
        console.print(largest_table(search))
    markdown = path.with_name("report.md")
    markdown.write_text(make_markdown(comparisons, results.searches, facts_of(report)))
    written = [markdown]
    if find_spec("matplotlib") is None:
        console.print("matplotlib is not installed: no pictures")
    else:
        from bench.compare.plots import draw_all

        written += draw_all(comparisons, results.runs, results.searches, path.parent)
    console.print(f"Written: {', '.join(map(str, [path, *written]))}", soft_wrap=True, highlight=False)


def facts_of(report: dict[str, Any]) -> list[str]:
    """What was run on what."""
    machine = report["machine"]
    host = f"{machine['cores']} cores, {machine['cpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB"
    peers = [f"{name} {version}" for name, version in machine["peers"].items()]
    software = [machine["system"], f"Python {machine['python']}", f"torch {machine['torch']}", *peers]
    return [f"`{report['command']}`", ", ".join([host, *machine["devices"]]), ", ".join(software)]
