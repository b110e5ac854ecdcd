"""Pieces of a bucket from the ranks that have them to those that need them: an all-to-all in which most ranks have little to say
to one another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .control import ControlGroup
from .numbering import next_number
from .pending import PendingCollective, PendingWork, start_message

Pieces = Mapping[int, int]
"""Elements by the slice of the rank that they come from or go to, in rising order; those of no elements are left out."""

_FIRST_TAG = 1 << 22  # of messages, out of the way of the control group's and of transports' own
_NUM_TAGS = 1 << 14
_NUM_EXCHANGES = 1 << 7


class Exchange(ABC):
    """Moves pieces between the ranks of a transport."""

    @abstractmethod
    def start(
        self, source: Tensor, target: Tensor, sends: Pieces, receives: Pieces, *, label: str = "a bucket"
    ) -> PendingCollective:
        """Start sending the pieces of `source`, and filling `target` with those that come. Collective.

        Until it is finished, neither may change. Other ranks come to theirs when they like; it ends when those have that send to
        this one or receive from it.

        Args:
            source, target: 1-D, contiguous, of one dtype, their pieces one after the other. What this rank has for itself may
                lie in both at the same place; nothing else may overlap.
        """


class MessageExchange(Exchange):
    """By messages, between those alone that have something for each other. Each knows from the plan what comes.

    Args:
        rank_of_slice: ranks of the group, by slice.
        count: is told how many bytes this rank sends.
    """

    def __init__(
        self, control: ControlGroup, slice_index: int, rank_of_slice: Sequence[int], count: Callable[[int], None]
    ) -> None:
        self._group = control.group
        self._slice_index = slice_index
        self._rank_of_slice = rank_of_slice
        self._count = count
        self._first_tag = _FIRST_TAG + next_number(self._group, MessageExchange) % _NUM_EXCHANGES * _NUM_TAGS
        self._number = 0

    def start(
        self, source: Tensor, target: Tensor, sends: Pieces, receives: Pieces, *, label: str = "a bucket"
    ) -> PendingCollective:
        tag = self._first_tag + self._number % _NUM_TAGS
        self._number += 1
        outgoing, incoming = cut_pieces(source, sends), cut_pieces(target, receives)
        own = outgoing.pop(self._slice_index, None)
        if own is not None:
            place = incoming.pop(self._slice_index)
            if place.data_ptr() != own.data_ptr():
                place.copy_(own)
        works = [
            (rank, start_message(message, piece.view(torch.uint8), rank, tag))
            for message, pieces in ((self._group.recv, incoming), (self._group.send, outgoing))
            for index, piece in pieces.items()
            for rank in (self._rank_of_slice[index],)
        ]
        self._count(sum(piece.nbytes for piece in outgoing.values()))
        what = f"bringing {label} to the ranks that step or share it"
        return PendingWork(what, works, (source, target), group=self._group, on_device=not source.is_cpu)


def cut_pieces(flat: Tensor, pieces: Pieces) -> dict[int, Tensor]:
    """The pieces of a flat tensor, views, by slice."""
    return dict(zip(pieces, torch.split(flat, list(pieces.values())), strict=True)) if pieces else {}


class Chained(PendingCollective):
    """Two collectives, of which the second needs the result of the first.

    Args:
        start_second: starts it.
        is_queued: the second comes behind the result of the first by itself, see `Transport.is_queued`.
    """

    def __init__(
        self, first: PendingCollective, start_second: Callable[[], PendingCollective], *, is_queued: bool
    ) -> None:
        self._first = first
        self._start_second: Callable[[], PendingCollective] | None = start_second
        self._second: PendingCollective | None = None
        if is_queued:
            self._start()

    def go_on(self) -> None:
        """Wait for the first and start the second, if that has not been done."""
        if self._second is None:
            self._first.finish()
            self._start()

    def _start(self) -> None:
        assert self._start_second is not None
        self._second = self._start_second()
        self._start_second = None  # and what it keeps, which may keep this one

    def finish(self) -> None:
        self.go_on()
        assert self._second is not None
        self._second.finish()

    def is_past(self) -> bool:
        return self._second is not None and self._second.is_past()

    def wait_until_read(self) -> None:
        """Until the input of the first may be overwritten."""
        self._first.wait_until_read()
