"""Which releases are tried, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = {  # each with the Pythons that it has wheels for
    "2.4.1": ("3.10", "3.11", "3.12"),
    "2.6.0": ("3.10", "3.11", "3.12", "3.13"),
    "2.9.1": PYTHONS,
    "2.13.0": PYTHONS,
}


class Cell(NamedTuple):
    torch: str
    python: str

    def __str__(self) -> str:
        return f"torch-{self.torch}-python-{self.python}"


def cells(torches: Sequence[str], pythons: Sequence[str]) -> Iterator[Cell]:
    """By torch, so that what its environments share is fetched once. One that is not in `TORCHES` is tried with every Python."""
    for torch in torches:
        yield from (Cell(torch, python) for python in pythons if python in TORCHES.get(torch, pythons))
