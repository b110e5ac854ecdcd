"""What each rank is doing, in memory that it shares with whoever wants to kill it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MOMENTS = ("starting", "wrap", "load", "forward", "backward", "first step", "step", "save", "ended")


class Marks:
    """A file of one moment and one step a rank. Each rank writes its own."""

    def __init__(self, path: Path, ranks: int) -> None:
        if not path.exists():
            path.write_bytes(bytes(16 * ranks))
        with path.open("r+b") as file:
            self._table = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.int64).reshape(-1, 2)

    def moment(self, rank: int) -> str:
        """What it does now, or did when it died."""
        return MOMENTS[self._table[rank, 0]]

    def step(self, rank: int) -> int:
        """How many steps it has done."""
        return int(self._table[rank, 1])

    def note_step(self, rank: int, step: int) -> None:
        """It has done so many steps."""
        self._table[rank, 1] = step

    def note(self, rank: int, moment: str) -> None:
        """It does this from now on."""
        self._table[rank, 0] = MOMENTS.index(moment)

    def clear(self) -> None:
        """Nobody has begun."""
        self._table[:] = 0

    @contextmanager
    def during(self, rank: int, moment: str) -> Iterator[None]:
        """It does this within the context."""
        before = self.moment(rank)
        self.note(rank, moment)
        yield
        self.note(rank, before)
