"""Each rank's copies on another host besides, so that a host may be lost with all its memory.

    host 0   rank 0 ──▶ rank 2   host 1        and from the last host to the first
             rank 1 ──▶ rank 3

What another host holds of a rank is a file as the rank's own, with two slots, of which one is whole. What all ranks have is not sent:
who keeps it takes it from its own model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..collectives import ControlGroup
from ..collectives.pending import PendingWork, start_message
from .alike import Alike
from .contents import Places
from .slots import Slots

_Array = NDArray[Any]

_TAG = 1 << 21  # of messages, apart from those of a control group
_WHAT = "copying to the next host"


@dataclass(frozen=True)
class Ring:
    """Who keeps whose copies.

    Attributes:
        to: the rank that keeps those of this one; None on a single host.
        sources: the ranks whose copies this one keeps.
    """

    to: int | None
    sources: list[int]

    @staticmethod
    def of(rank: int, hosts: Sequence[Sequence[int]]) -> Ring:
        """That of a rank.

        Args:
            hosts: the ranks of each host.
        """
        if len(hosts) == 1:
            return Ring(None, [])
        keeper = {
            one: hosts[(number + 1) % len(hosts)][index % len(hosts[(number + 1) % len(hosts)])]
            for number, host in enumerate(hosts)
            for index, one in enumerate(host)
        }
        return Ring(keeper[rank], [one for one, other in sorted(keeper.items()) if other == rank])


class Neighbours:
    """What this rank keeps for ranks of the host before its own, and sends to one of the next.

    Args:
        control: of a Gloo group that only one thread uses at a time.
        mine: what is sent, from `begin` on.
        begin: in a slot, where that begins which not all ranks have.
        directory: where what comes is kept.
        places: in the slots of the ring's sources, in their order.
        alike: what all ranks have.

    Attributes:
        kept: of the ring's sources, in their order.

    Raises:
        CollectiveError: a neighbour is gone.
        OSError: there is not enough memory. What others send is taken all the same.
    """

    def __init__(
        self,
        control: ControlGroup,
        ring: Ring,
        mine: Slots,
        begin: int,
        directory: Path,
        places: Sequence[Places],
        alike: Alike,
    ) -> None:
        self._control, self._ring, self._mine, self._begin = control, ring, mine, begin
        self._places, self._alike = places, alike
        name = _array(mine.path.name.encode())
        table = _array(mine.table)
        sizes = np.array([len(name), len(table), mine.slot_bytes], dtype=np.int64)
        told = self._exchange(sizes, [np.zeros(3, dtype=np.int64) for _ in ring.sources])
        names = self._exchange(name, [np.zeros(size[0], dtype=np.uint8) for size in told])
        tables = self._exchange(table, [np.zeros(size[1], dtype=np.uint8) for size in told])
        self.kept = [
            Slots.make(directory / name.tobytes().decode(), table.tobytes(), int(size[2]))
            for size, name, table in zip(told, names, tables, strict=True)
        ]
        self._written = [0] * len(self.kept)  # slots

    def begin(self) -> Callable[[], None]:
        """Begin the copies of others with what this rank has, too. What steps change of it is copied by what is returned, before any rank
        steps again."""
        self._written = [kept.older for kept in self.kept]
        targets = [
            view
            for kept, slot, places in zip(self.kept, self._written, self._places, strict=True)
            for view in places.views(kept.begin(slot), alike=True)
        ]
        return self._alike.copy_begun(targets)

    def exchange(self, step: int) -> None:
        """Send the slot of a step, and keep those of others, which have begun. All ranks call it."""
        slot = self._mine.slot_of(step)
        assert slot is not None
        into = [
            kept.bytes_of(slot)[places.alike_end :]
            for kept, slot, places in zip(self.kept, self._written, self._places, strict=True)
        ]
        self._exchange(self._mine.bytes_of(slot)[self._begin :], into)
        for kept, written in zip(self.kept, self._written, strict=True):
            kept.finish(written, step)

    def _exchange(self, mine: _Array, into: list[_Array]) -> list[_Array]:
        """Send an array to the next host, and receive one from each source."""
        group, ring = self._control.group, self._ring
        works = [
            (source, start_message(group.recv, _bytes(array), source, _TAG))
            for source, array in zip(ring.sources, into, strict=True)
            if array.size
        ]
        if ring.to is not None:
            works.append((ring.to, start_message(group.send, _bytes(mine), ring.to, _TAG)))
        PendingWork(_WHAT, works, (mine, *into), group=group).finish()
        return into


class Fetch:
    """The slot of a step on its way from the first of some ranks to all of them, which alone take part. They are of different hosts.

    What can fail on one of them for itself is apart from what they do together, so that no rank waits for another that has no room.

    Args:
        control: of a Gloo group that only one thread uses at a time.
        path: of the file, which the first rank has. On the others it has another name until it is whole.
    """

    def __init__(self, control: ControlGroup, path: Path, step: int, ranks: Sequence[int]) -> None:
        self._control, self._path, self._step, self._ranks = control, path, step, ranks
        self._is_source = control.rank == ranks[0]
        self._slots: Slots | None = None
        self._table, self._slot_bytes = b"", 0

    def open(self) -> None:
        """Not collective. Raises OSError where the file cannot be read."""
        if self._is_source:
            self._slots = Slots.open(self._path)
            self._table, self._slot_bytes = self._slots.table, self._slots.slot_bytes

    def hear(self) -> None:
        """Find out what there is to fetch. Raises CollectiveError where one of the ranks is gone."""
        sizes = torch.tensor([len(self._table), self._slot_bytes], device="cpu")
        self._pass_on(sizes)
        table = _array(self._table) if self._is_source else np.zeros(int(sizes[0]), dtype=np.uint8)
        self._pass_on(_bytes(table))
        self._table, self._slot_bytes = table.tobytes(), int(sizes[1])

    def make_room(self) -> None:
        """Not collective. Raises OSError where there is not enough memory."""
        if not self._is_source:
            self._slots = Slots.make(self._being_fetched, self._table, self._slot_bytes, slots=1)

    def bring(self) -> None:
        """When all of the ranks have room. Raises CollectiveError where one of them is gone."""
        assert self._slots is not None
        if self._is_source:
            slot = self._slots.slot_of(self._step)
            assert slot is not None
            self._pass_on(_bytes(self._slots.bytes_of(slot)))
            return
        self._pass_on(_bytes(self._slots.begin(0)))
        self._slots.finish(0, self._step)
        self._being_fetched.rename(self._path)

    def give_up(self) -> None:
        """Leave nothing that is not whole. Not collective."""
        self._being_fetched.unlink(missing_ok=True)

    @property
    def _being_fetched(self) -> Path:
        return self._path.with_name(f".fetched-{self._path.name}")

    def _pass_on(self, tensor: Tensor) -> None:
        self._control.pass_on(tensor, self._ranks, _WHAT)


def _array(content: bytes) -> _Array:
    return np.frombuffer(bytearray(content), dtype=np.uint8)


def _bytes(array: _Array) -> Tensor:
    return torch.from_numpy(array.view(np.uint8))
