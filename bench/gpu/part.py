"""What the command is made of: parts that each answer one question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What all parts are told.

    Attributes:
        device: "cuda", or "cpu" in a rehearsal.
        num_devices: GPUs that there are.
        scratch: a folder for files that need not be kept.
    """

    device: str
    num_devices: int
    scratch: Path

    @property
    def rehearses(self) -> bool:
        """Whether there is next to nothing to do, to see that all of it works."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Table:
    """Figures as a person reads them."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Findings:
    """What came of a part.

    Attributes:
        problem: what is wrong, in a line; None where nothing is.
        notes: sentences that stand above the tables.
        figures: all that was measured, of what `json.dumps` takes.
        output: what its commands wrote.
    """

    problem: str | None = None
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    output: str = ""


@dataclass(frozen=True)
class Part:
    """One question, and who answers it.

    Attributes:
        limit_s: seconds after which it is stopped. What it has found until then counts.
        run: answers it within so many seconds.
        min_devices: GPUs without which it is left out.
    """

    name: str
    question: str
    limit_s: float
    run: Callable[[Setting, float], Findings]
    min_devices: int = 1
