"""Copies what a rank has into its slots, some of it while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem

from .contents import Entries, Places, copy_into, kept_views, put_values, shapes_of
from .place import make_directory
from .slots import Slots


class Copier:
    """The slots of one rank, and what goes where in them.

    Args:
        path: of the file, which is made.
        places: of this rank's plan.
        metadata: of all ranks; None but on the first one.

    Attributes:
        slots: that it copies to.
        alike_end: where in them what this rank alone has begins.

    Raises:
        OSError: there is not enough memory.
    """

    def __init__(self, path: Path, places: Places, metadata: Metadata | None, entries: Entries) -> None:
        self._places, self.alike_end = places, places.alike_end
        self._signature = entries.signature
        make_directory(path.parent)
        self.slots = Slots.make(path, self._places.table(metadata, path.name), self._places.slot_bytes)
        slots = [self.slots.bytes_of(number) for number in (0, 1)]
        self._targets = [self._places.views(slot) for slot in slots]
        self._kept_targets = [kept_views(slot, self._places.kept_begin, shapes_of(entries.kept)) for slot in slots]

    def fits(self, entries: Entries, packed: bytes) -> bool:
        """Whether everything has its place."""
        return entries.signature == self._signature and self._places.has_room(packed)

    def begin(self, entries: Entries, packed: bytes, step: int) -> Callable[[], None]:
        """Copy what others than steps may change; the rest is copied by what is returned, after which the slot is whole.

        Buffers and frozen parameters are copied each time: kernels of statistics and writes to `.data` leave no trace by which a
        change could be told.
        """
        number = self.slots.older
        slot = self.slots.begin(number)
        put_values(slot, self._places.values_begin, packed)
        later: list[tuple[Tensor, WriteItem]] = []
        for item, target in self._targets[number]:
            if entries.is_shard(item):
                later.append((target, item))
            else:
                copy_into(target, entries.tensor(item))

        @torch.no_grad()
        def finish() -> None:
            for target, kept in zip(self._kept_targets[number], entries.kept, strict=True):
                copy_into(target, kept)
            for target, item in later:
                copy_into(target, entries.tensor(item))
            self.slots.finish(number, step)

        return finish
