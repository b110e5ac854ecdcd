"""Copies what a rank has into its slots, some of it while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from .contents import Entries, Places, copy_into, put_values
from .slots import Slots

_WORTH_A_LOOK = 4096  # elements


class Copier:
    """The slots of one rank, and what goes where in them.

    Args:
        path: of the file, which is made.
        plan: of this rank.
        metadata: of all ranks; None but on the first one.

    Attributes:
        slots: that it copies to.

    Raises:
        OSError: there is not enough memory.
    """

    def __init__(self, path: Path, plan: SavePlan, metadata: Metadata | None, entries: Entries, packed: bytes) -> None:
        self._places = Places.of(plan, len(packed))
        self._signature = entries.signature
        self._known: list[dict[str, tuple[int, int]]] = [{}, {}]  # memory and version of what lasts, by slot
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.slots = Slots.make(path, self._places.table(metadata, path.name), self._places.slot_bytes)
        self._targets = [self._places.views(self.slots.bytes_of(slot)) for slot in (0, 1)]

    def fits(self, entries: Entries, packed: bytes) -> bool:
        """Whether everything has its place."""
        return entries.signature == self._signature and self._places.has_room(packed)

    def begin(self, entries: Entries, packed: bytes, step: int) -> Callable[[], None]:
        """Copy what others than steps may change; the rest is copied by what is returned, after which the slot is whole."""
        number = self.slots.older
        slot = self.slots.begin(number)
        put_values(slot, self._places.values_begin, packed)
        later: list[tuple[Tensor, WriteItem]] = []
        for item, target in self._targets[number]:
            if entries.is_shard(item):
                later.append((target, item))
            elif self._may_have_changed(number, item.index.fqn, entries.plain(item)):
                copy_into(target, entries.tensor(item))

        @torch.no_grad()
        def finish() -> None:
            for target, item in later:
                copy_into(target, entries.tensor(item))
            self.slots.finish(number, step)

        return finish

    def _may_have_changed(self, slot: int, key: str, value: Tensor) -> bool:
        """Since it was copied to this slot. Of what the model has for long, such as frozen parameters, torch knows it."""
        if not key.startswith("model.") or value.numel() < _WORTH_A_LOOK:
            return True
        now = int(value.data_ptr()), int(value._version)
        before, self._known[slot][key] = self._known[slot].get(key), now
        return before != now
