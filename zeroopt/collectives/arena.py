"""The shared memory of one host's ranks: one piece a rank, mapped once by each of them, from which buffers are cut.

A mapping for each buffer would be one of many thousands, of which a process may have 65,530 (vm.max_map_count), and all ranks would have
to meet for each. As it is, all know where a buffer lies from what they have cut before, for all cut the same.

    rank 0    │ buffer 0 │ buffer 1 │   no longer used   │ buffer 3 │  addresses, no memory so far …
    rank 1    │ buffer 0 │ buffer 1 │   no longer used   │ buffer 3 │

What is cut is never cut again, so that it starts with zeros and nobody mistakes it for another: addresses are plenty, and memory
goes back to the system. A new piece is mapped when the addresses of one are used up.
"""

from __future__ import annotations

import os
import resource
import weakref
from collections import deque
from collections.abc import Sequence
from mmap import PAGESIZE

import torch
from torch import Tensor

from .. import _C
from ..pages import release
from .control import ControlGroup
from .shared_memory import map_together

_MOST_ADDRESSES = (
    1 << 42
)  # a thirty-second of those that a process has: every model has some, and what is used up is mapped anew
_LIMITED_SHARE = 8  # of what a user allows a process, the part that one host's ranks take


class Arena:
    """Buffers in memory that ranks of one host share.

    Making one is collective over the whole group, as is `cut` where a piece is used up.

    Args:
        members: the group's ranks on this host.
        returns: takes what this rank no longer uses.
        piece_bytes: addresses of a piece, the smallest that a rank of the group asks for; None: as much as the host has memory.

    Raises:
        SharedMemoryError: on all ranks, when one of them cannot share memory with its peers.
    """

    def __init__(
        self, control: ControlGroup, members: Sequence[int], returns: Returns, piece_bytes: int | None = None
    ) -> None:
        self._control = control
        self._members = members
        self._index = members.index(control.rank)
        self._returns = returns
        wanted = addresses_of_a_rank(len(members)) if piece_bytes is None else piece_bytes
        self._piece_bytes = -int(control.largest(torch.tensor(-wanted, device="cpu"), "sharing memory"))
        self._pieces: list[memoryview] = []
        self._begin = 0
        self._map(self._piece_bytes)

    def _map(self, num_bytes: int) -> None:
        self._pieces, descriptor = map_together(self._control, self._members, num_bytes)
        os.close(descriptor)
        self._begin = 0

    def cut(self, num_bytes: int, *, shared: bool) -> list[Tensor]:
        """A new buffer of each member, or one for all: uint8, by member. All ranks of the group make the same calls."""
        length = -(-num_bytes // PAGESIZE) * PAGESIZE
        if self._begin + length > len(self._pieces[0]):
            self._map(max(length, self._piece_bytes))
        begin, self._begin = self._begin, self._begin + length
        if shared:
            return [self._part(0, begin, num_bytes, shared=True)] * len(self._members)
        return [self._part(index, begin, num_bytes, shared=False) for index in range(len(self._members))]

    def _part(self, index: int, begin: int, num_bytes: int, *, shared: bool) -> Tensor:
        piece = self._pieces[index]
        part = piece[begin : begin + num_bytes]  # what the tensor's storage holds
        if index == self._index:
            self._returns.expect(part, piece, begin, num_bytes, shared=shared)
        return torch.frombuffer(part, dtype=torch.uint8)


class Returns:
    """Gives memory of this rank back to the system when no rank uses it any more: this one has dropped it, and all have read the
    tickets that it had posted by then. Of memory that other ranks have, too, they may have dropped it later: all have read a ticket
    that this one has posted since.

    Args:
        board: of the ranks of the host.
        memory: in which the board lies.
        index: this rank's on the board.
    """

    def __init__(self, board: _C.ShmBoard, memory: memoryview, index: int) -> None:
        self._board = board
        self._memory = memory
        self._index = index
        self._pid = os.getpid()
        self._dropped: deque[tuple[int, memoryview]] = deque()  # how many tickets are to be read, and what
        self._is_closed = False

    def expect(self, part: memoryview, piece: memoryview, begin: int, num_bytes: int, *, shared: bool) -> None:
        """Take a part of a piece when it is dropped. `shared`: other ranks may have it, too."""
        weakref.finalize(part, self._take, piece, begin, num_bytes, shared).atexit = False

    def _take(self, piece: memoryview, begin: int, num_bytes: int, shared: bool) -> None:
        if os.getpid() != self._pid:  # a forked child drops its copy
            return
        part = piece[begin : begin + -(-num_bytes // PAGESIZE) * PAGESIZE]
        posted = self._board.posted()[self._index]
        if not shared and self._all_have_read(posted):
            _give_back(part)
        elif not self._is_closed:
            self._dropped.append((posted + shared, part))

    def close(self) -> None:
        """No more tickets will be posted here. What is dropped from now on is given back where others have read all that there is."""
        self._is_closed = True

    def sweep(self) -> None:
        """Give back what can be."""
        while self._dropped and self._all_have_read(self._dropped[0][0]):
            _give_back(self._dropped.popleft()[1])

    def _all_have_read(self, count: int) -> bool:
        return all(read >= count or left for read, left in zip(self._board.read(), self._board.left(), strict=True))


def _give_back(part: memoryview) -> None:
    release(torch.frombuffer(part, dtype=torch.uint8))


def addresses_of_a_rank(num_ranks: int) -> int:
    """How many bytes of addresses a rank's piece takes in each process: of as much memory as the host has, where as many are to be had
    for each of its ranks."""
    in_all = _MOST_ADDRESSES
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        in_all = min(in_all, limit // _LIMITED_SHARE)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(physical, in_all // num_ranks) // PAGESIZE) * PAGESIZE
