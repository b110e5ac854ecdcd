"""Memory that outlives a process: a file in memory with two slots, of which one is whole whenever the process is killed.

    ┌────────┬───────┬────────┬────────┐
    │ header │ table │ slot 0 │ slot 1 │
    └────────┴───────┴────────┴────────┘

The header says of which step each slot is. While one is written, it says that it is of none.

The second slot takes no memory before it is asked for, and a slot that nobody needs any more gives its own back: where one file follows
another, there are never more than two slots of each rank.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..pages import release

_MAGIC = 0x7A65726F736C6F74  # "zeroslot", of files that are laid out like this
_HEADER_BYTES = 4096
_PAGE = 4096
_FIELDS = 5  # magic, bytes of the table, bytes of a slot, and the steps of the two slots
_STEPS = 3  # the first field of these
NOT_WHOLE = -1


class Slots:
    """A file of two slots. Made by `make` or `open`.

    Attributes:
        path: of the file.
        slot_bytes: of each slot.
    """

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self._bytes = np.frombuffer(mapped, dtype=np.uint8)
        self._header: NDArray[np.int64] = self._bytes[: _FIELDS * 8].view(np.int64)
        self.slot_bytes = int(self._header[2])

    @staticmethod
    def make(path: Path, table: bytes, slot_bytes: int, *, slots: int = 2) -> Slots:
        """A new file, in place of one that is there. The memory of the first slot is taken at once, that of the second by `take_second`.

        Args:
            slots: 1 for what is only to be read.

        Raises:
            OSError: there is not so much memory, or the file cannot be made.
        """
        table_bytes = _up_to_page(len(table))
        slot_bytes = _up_to_page(slot_bytes)
        made = path.with_name(f".{path.name}")
        descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _HEADER_BYTES + table_bytes + slots * slot_bytes)
            os.posix_fallocate(descriptor, 0, _HEADER_BYTES + table_bytes + slot_bytes)
            mapped = mmap.mmap(descriptor, 0)
            header = np.frombuffer(mapped, dtype=np.int64, count=_FIELDS)
            header[:] = (_MAGIC, len(table), slot_bytes, NOT_WHOLE, NOT_WHOLE)
            mapped[_HEADER_BYTES : _HEADER_BYTES + len(table)] = table
            made.rename(path)
        except BaseException:
            with suppress(OSError):
                made.unlink()
            raise
        finally:
            os.close(descriptor)
        return Slots(path, mapped)

    @staticmethod
    def open(path: Path) -> Slots:
        """A file that is there. Raises OSError where it is no such file."""
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        if len(mapped) < _HEADER_BYTES or np.frombuffer(mapped, dtype=np.int64, count=1)[0] != _MAGIC:
            raise OSError(f"{path} is no file of slots")
        return Slots(path, mapped)

    @property
    def table(self) -> bytes:
        """What was given to `make`."""
        return self._bytes[_HEADER_BYTES : _HEADER_BYTES + int(self._header[1])].tobytes()

    @property
    def steps(self) -> tuple[int, int]:
        """Of which step each slot is; NOT_WHOLE: of none."""
        return int(self._header[_STEPS]), int(self._header[_STEPS + 1])

    @property
    def bytes_with_one(self) -> int:
        """What a file takes that has one of the slots."""
        return _HEADER_BYTES + _up_to_page(int(self._header[1])) + self.slot_bytes

    @property
    def older(self) -> int:
        """The slot that is to be written next."""
        first, second = self.steps
        return 0 if first <= second else 1

    def slot_of(self, step: int) -> int | None:
        """The slot that is whole and of this step."""
        return self.steps.index(step) if step in self.steps else None

    def begin(self, slot: int) -> NDArray[np.uint8]:
        """The bytes of a slot, which is to be written."""
        self._header[_STEPS + slot] = NOT_WHOLE
        return self.bytes_of(slot)

    def finish(self, slot: int, step: int) -> None:
        """It is whole."""
        self._header[_STEPS + slot] = step

    def forget(self) -> None:
        """No slot is of any step."""
        self._header[_STEPS : _STEPS + 2] = NOT_WHOLE

    def take_second(self) -> None:
        """Take the memory of the second slot, where it has none. Raises OSError where there is not so much."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, self._start_of(1), self.slot_bytes)
        finally:
            os.close(descriptor)

    def give_back(self, *, all_but: int) -> None:
        """Give back the memory of slots that are not of this step, which nobody needs, and nobody writes to any more."""
        for slot, step in enumerate(self.steps):
            if step != all_but and self._start_of(slot) < len(self._bytes):
                release(torch.from_numpy(self.begin(slot)))

    def bytes_of(self, slot: int) -> NDArray[np.uint8]:
        """The bytes of a slot."""
        start = self._start_of(slot)
        return self._bytes[start : start + self.slot_bytes]

    def _start_of(self, slot: int) -> int:
        return self.bytes_with_one + (slot - 1) * self.slot_bytes


def _up_to_page(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
