"""What has come of all cells, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from tests.matrix.cells import Cell
from tests.matrix.suite import Outcome


def table(outcomes: Mapping[Cell, Outcome]) -> str:
    """A row for each torch, a column for each Python; a dash where they do not go together, or were not asked for."""
    pythons = sorted({cell.python for cell in outcomes}, key=lambda python: tuple(map(int, python.split("."))))
    lines = [_row("torch", [f"Python {python}" for python in pythons]), _row("---", ["---"] * len(pythons))]
    for torch in dict.fromkeys(cell.torch for cell in outcomes):
        found = (outcomes.get(Cell(torch, python)) for python in pythons)
        lines.append(_row(torch, ["–" if outcome is None else str(outcome) for outcome in found]))
    return "\n".join(lines)


def _row(head: str, entries: list[str]) -> str:
    return f"| {' | '.join([head, *entries])} |"
