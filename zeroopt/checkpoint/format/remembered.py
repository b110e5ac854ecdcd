"""What the ranks of a group know of the checkpoint that they have written last, so that they need not tell it again.

A plan of what each rank writes, and where in its file that has come to lie, is mostly what it was in the save before. To gather all that
on rank 0 and to put it together there takes longer the more ranks there are. So a rank that has nothing new to say names the save
by its number, and rank 0 takes what it remembers.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult


@dataclass
class Remembered:
    """By one rank of the last save; nothing at first, and after a save that has failed.

    Attributes:
        number: of the save in which all ranks have planned, the same on all of them.
        plan: what this rank writes.
        metadata: on rank 0, DCP's of all ranks, as it is in the file.
    """

    number: int | None = None
    plan: SavePlan | None = None
    metadata: bytes | None = None
    _planned: bytes = field(default=b"", repr=False)
    _written: bytes = field(default=b"", repr=False)

    def forget(self) -> None:
        """Nothing is known of the last save."""
        self.number = self.plan = self.metadata = None
        self._planned = self._written = b""

    def has_planned(self, local: SavePlan) -> bool:
        """Whether this rank wanted to write the same."""
        return self.number is not None and self._planned == _digest(local.items, local.planner_data)

    def take_plan(self, number: int, local: SavePlan, plan: SavePlan) -> None:
        """Remember a plan of all, of which this rank has given one part and writes another."""
        self.forget()
        self.number, self.plan = number, plan
        self._planned = _digest(local.items, local.planner_data)

    def has_written(self, results: Sequence[WriteResult]) -> bool:
        """Whether everything has come to lie where it did."""
        return self._written == _digest(results)

    def take_results(self, results: Sequence[WriteResult]) -> None:
        """Remember where what this rank has written lies; rank 0 knows it, too."""
        self._written = _digest(results)

    def merge(self, results: Sequence[list[WriteResult] | None]) -> tuple[Metadata, list[list[WriteResult]]]:
        """On rank 0: the metadata that are remembered, and where everything lies: what ranks have told, else what is remembered."""
        assert self.metadata is not None
        metadata: Metadata = pickle.loads(self.metadata)
        before = [WriteResult(index, place.length, place) for index, place in metadata.storage_data.items()]
        return metadata, [before, *(told for told in results if told is not None)]


def _digest(*values: object) -> bytes:
    """By their text, which says all of plans and results."""
    return hashlib.sha256(repr(values).encode()).digest()
