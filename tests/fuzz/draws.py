"""Numbers and choices out of bytes, so that a change of one byte changes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """What an input says, from its beginning on; where it has ended, the first choice and 0."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, end: int) -> int:
        """A number of [0, end)."""
        num_bytes = ((end - 1).bit_length() + 7) // 8
        drawn = self._data[self._at : self._at + num_bytes]
        self._at += num_bytes
        return int.from_bytes(drawn, "little") % end

    def one_of(self, choices: Sequence[T]) -> T:
        """One of them."""
        return choices[self.below(len(choices))]
