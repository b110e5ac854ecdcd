"""The transport of ranks on one host: buckets lie in shared memory, and each rank reads what it needs where it lies.

reduce-scatter   A rank posts that its bucket is full. Once all have, each sums its own slice straight from its peers'
                 buckets. Nobody waits until a buffer is needed again, or the sum is.
all-gather       A rank writes its slice into its peers' buckets, one copy, and posts that it has. With one bucket for all
                 ranks (`shared`), there is nothing to write.

No bytes go through sockets, and there is no thread or process besides the ranks: what a rank can do without waiting, it does
when it starts or is asked for `progress`. A rank that blocks sleeps on a futex. See csrc/cpu/shm_board.h for how ranks tell
each other how far they are.
"""

from __future__ import annotations

import os
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import repeat
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _C, ops
from ..errors import CollectiveError
from ..profiling import named_range
from .arena import Arena, Returns
from .base import Transport
from .failure import ADVICE, name_ranks
from .group_timeout import group_timeout
from .lost import add_witness, name_lost, name_of
from .pending import PendingCollective
from .shared_memory import SharedMemoryError, map_together
from .site import Site
from .wire import PLAIN, Wire

# How often a blocked rank looks whether its peers are alive, and lets Python handle signals.
_CHECK_SECONDS = 0.1

CPU = torch.device("cpu")


class Kind(IntEnum):
    """What a ticket on the board stands for."""

    REDUCE_SCATTER = 0
    ALL_GATHER = 1
    MAX = 2
    SCALAR = 3
    RENDEZVOUS = 4

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, eq=False)
class SharedBuffer:
    """One buffer of every rank, all of the same size.

    Attributes:
        number: position in the order of allocation, the same on all ranks.
        of_rank: uint8, 1-D, by rank.
        shared: all ranks have the same memory.
    """

    number: int
    of_rank: list[Tensor]
    shared: bool

    def like(self, tensor: Tensor, rank: int) -> Tensor:
        """What lies in a rank's buffer where `tensor` lies in this rank's, from the first element on."""
        return self.of_rank[rank][: tensor.nbytes].view(tensor.dtype)


class Labels(dict[str, int]):
    """What collectives are about, as numbers: ranks that mean different buckets have diverged, and can say which. All ranks call
    the same thing by the same label.

    `labels[label] << 8 | kind`, positive in 64 bits, stands on a ticket.
    """

    def __init__(self) -> None:
        super().__init__()
        self._label_of: dict[int, str] = {}

    def __missing__(self, label: str) -> int:
        self[label] = digest = zlib.crc32(label.encode())
        self._label_of[digest] = label
        return digest

    def describe(self, number: int) -> str:
        """A number of any rank's, in words. A label that this rank has not used so far is not known to it."""
        label = self._label_of.get(number >> 8, "what this rank has not come to yet")
        return f"{Kind(number & 0xFF)} of {label}"


class ShmTransport(Transport):
    """Works on buckets in memory that all members share.

    Making one is collective over the whole group; `allocate` asks the others for nothing but more addresses, when those of the arena
    are used up. Everything else is among the members.

    Attributes:
        read_by_all: how many tickets all members have read, as far as this rank has looked.

    Args:
        members: the ranks of the group that are on this host. Buckets have a slice for each of them.

    Raises:
        SharedMemoryError: on all ranks, when one of them cannot share memory with its peers.
    """

    name = "shm"
    needs_staging = False
    shares_parameters = True
    is_local = True
    needs_gloo_on_cpu = True

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int]) -> None:
        super().__init__(group)
        self._members = list(members)
        self._names = [name_of(group, rank) for rank in members]
        self.slice_index = self._members.index(self.control.rank)
        self.num_slices = len(self._members)
        self.writers = self._members[:1]
        self._buffers: dict[int, SharedBuffer] = {}
        self._allocated = 0
        self._failure: str | None = None
        self._by_address: dict[int, SharedBuffer] = {}

        (memory, *_), self._descriptor = map_together(
            self.control, self._members, _C.ShmBoard.bytes(self.num_slices), one_for_all=True
        )
        _C.hold_rank_lock(self._descriptor, self.slice_index)  # tells peers for as long as this process lives
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._board = _C.ShmBoard(address, self.slice_index, self.num_slices)
        self._returns = Returns(self._board, memory, self.slice_index)
        weakref.finalize(self, _leave, os.getpid(), self._board, self._returns, self._descriptor)
        self._arena = Arena(self.control, self._members, self._returns)
        self._posted = 0
        self.read_by_all = 0
        self._labels = Labels()
        self._unread: deque[_Read] = deque()  # in the order of their tickets, in which they are read
        self._scalar = self.allocate(1, torch.float64, CPU)
        self._scalar_before: _Read | None = None
        add_witness(group, self)

    @classmethod
    def serves(cls, site: Site) -> bool:
        return super().serves(site) and len(site.hosts) == 1

    @classmethod
    def hops_among(cls, num_slices: int, num_hosts: int) -> int:
        return 0  # nothing is sent

    @classmethod
    def connect(cls, site: Site) -> Transport:
        if len(site.hosts) > 1:
            raise SharedMemoryError(f"the ranks are on {len(site.hosts)} hosts, for which transport='auto' is made")
        return cls(site.group, site.hosts[0])

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> Tensor:
        assert device.type == "cpu"
        of_rank = self._arena.cut(max(1, numel) * dtype.itemsize, shared=shared)
        buffer = SharedBuffer(self._allocated, of_rank, shared)
        self._buffers[buffer.number] = buffer
        self._allocated += 1
        own = of_rank[self.slice_index]
        self._by_address[own.data_ptr()] = buffer
        return own.view(dtype)[:numel]

    def take_up(self, buffer: Tensor, other: ShmTransport) -> None:
        """Work on a buffer from another transport's `allocate`, of the same members. Not collective, but all ranks take up the same
        buffers, and this one allocates none itself."""
        taken = other._buffer_of(buffer)
        self._buffers[taken.number] = self._by_address[buffer.data_ptr()] = taken

    def free(self, buffer: Tensor) -> None:
        del self._buffers[self._by_address.pop(buffer.data_ptr()).number]

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingRead:
        numel = full.numel() // self.num_slices
        own_part = itemgetter(slice(self.slice_index * numel, (self.slice_index + 1) * numel))

        def add_slices(buckets: list[Tensor]) -> None:
            with named_range("sum", label):
                wire.combine(list(map(own_part, buckets)), out, base)

        return self._start_reading(Kind.REDUCE_SCATTER, full, add_slices, label)

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        buffer = self._buffer_of(full)
        if not buffer.shared:
            own = self.own_slice(full)
            for peer in self._peers():
                ops.copy(own, self.own_slice(buffer.like(full, peer)))
        return _Arrival(self, self._post(Kind.ALL_GATHER, full, label), label)

    def start_rendezvous(self, label: str) -> PendingCollective:
        return self._start_reading(Kind.RENDEZVOUS, None, lambda _: None, label)

    def start_max(self, flags: Tensor, out: Tensor, *, label: str = "flags") -> PendingCollective:
        def take_largest(of_rank: list[Tensor]) -> None:
            torch.amax(torch.stack(of_rank), dim=0, out=out)

        return self._start_reading(Kind.MAX, flags, take_largest, label)

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        if self._scalar_before is not None:
            self.wait_until_read(self._scalar_before)
        self._scalar.copy_(value)
        values: list[Tensor] = []

        def take_all(of_rank: list[Tensor]) -> None:
            values.extend(one.clone() for one in of_rank)

        self._scalar_before = self._read_when_posted(Kind.SCALAR, self._scalar, take_all, label)
        self.read_through(self._scalar_before.number)
        return torch.cat(values).to(value.dtype)

    def progress(self) -> None:
        while self._unread and self._board.wait(self._unread[0].number + 1, _C.ShmBoard.NEVER, 0.0):
            self._read_first()

    def barrier(self) -> None:
        self.start_rendezvous("barrier").finish()

    def give_up(self, reason: str) -> None:
        self._board.leave()

    def wait_until_posted(self, number: int, kind: Kind, label: str) -> None:
        """Block until all members have posted a ticket."""
        self._wait(number + 1, _C.ShmBoard.NEVER, kind, label)

    def has_read(self, number: int) -> bool:
        """Whether this rank has read all that it needs for a ticket."""
        return not self._unread or self._unread[0].number > number

    def read_through(self, number: int) -> None:
        """Read everything up to a ticket."""
        while self._unread and self._unread[0].number <= number:
            first = self._unread[0]
            self.wait_until_posted(first.number, first.kind, first.label)
            self._read_first()

    def wait_until_read(self, read: _Read) -> None:
        """Block until all members have read what one ticket is about, and meanwhile read what can be read: they may wait for that."""
        if read.number >= self.read_by_all:
            self._wait_until_read(read.number, read.kind, read.label)

    def _wait_until_read(self, number: int, kind: Kind, label: str) -> None:
        while not self._board.wait(_C.ShmBoard.NEVER, number + 1, 0.0):
            next_posted = self._unread[0].number + 1 if self._unread else _C.ShmBoard.NEVER
            self._wait(next_posted, number + 1, kind, label)
            self.progress()
        self.read_by_all = max(self.read_by_all, number + 1)

    def _start_reading(
        self, kind: Kind, tensor: Tensor | None, read: Callable[[list[Tensor]], None], label: str
    ) -> PendingRead:
        return PendingRead(self, self._read_when_posted(kind, tensor, read, label))

    def _read_when_posted(
        self, kind: Kind, tensor: Tensor | None, read: Callable[[list[Tensor]], None], label: str
    ) -> _Read:
        to_read = _Read(self._post(kind, tensor, label), kind, tensor, read, label)
        self._unread.append(to_read)
        return to_read

    def _post(self, kind: Kind, tensor: Tensor | None, label: str) -> int:
        buffer, num_bytes = (-1, 0) if tensor is None else (self._buffer_of(tensor).number, tensor.nbytes)
        if self._posted - _C.ShmBoard.CAPACITY >= self.read_by_all:
            self._wait_until_read(self._posted - _C.ShmBoard.CAPACITY, kind, label)
        number = self._board.post(_C.Ticket(self._labels[label] << 8 | kind, num_bytes, buffer))
        self._posted = number + 1
        self._returns.sweep()
        if kind is Kind.ALL_GATHER and not self._unread:
            self._board.mark_read(self._posted)  # there is nothing to read for it
        return number

    def _read_first(self) -> None:
        first = self._unread[0]
        tickets = self._tickets(first.number)
        self._check_alike(tickets)
        assert first.read is not None
        if first.tensor is None:
            first.read([])
        else:
            # What lies in each rank's buffer where the tensor lies in this one's, from the first element on.
            num_bytes, dtype = first.tensor.nbytes, first.tensor.dtype
            buffers = self._buffers
            first.read([buffers[t.buffer].of_rank[rank][:num_bytes].view(dtype) for rank, t in enumerate(tickets)])
        first.read = None  # it holds what was read and where that went
        # Off the queue before peers are told, for the count that they are told is that of the first ticket in it.
        self._unread.popleft()
        self._board.mark_read(self._unread[0].number if self._unread else self._posted)

    def _wait(self, posted_count: int, read_count: int, kind: Kind, label: str) -> None:
        """Block until all have posted, or read, so many tickets."""
        if self._failure is not None:
            raise CollectiveError(self._failure)
        begin = time.monotonic()
        # The board is asked first: what is there already costs no look at peers, and counts though one of them has left since.
        while not self._board.wait(posted_count, read_count, _CHECK_SECONDS):
            # Peers before their counters: a rank that does its part and ends in between has done it.
            suspects = set[int]().union(*self._behind(posted_count, read_count))
            lost = {rank for rank in suspects if self._is_lost(rank)}
            behind = self._behind(posted_count, read_count)
            in_vain = all(ranks & lost for ranks in behind)  # either goal would have been enough
            if in_vain or (all(behind) and time.monotonic() - begin > self._timeout_s()):
                # While this rank itself has not read, it waits for those who have not posted.
                late = behind[0] if self.slice_index in behind[-1] else behind[-1]
                blamed = set.union(*behind) & lost if in_vain else late
                raise self._fail(
                    f"transport shm, {kind} of {label}: rank {self._names[self.slice_index]} waits in vain for {self._name(blamed)}"
                )

    def _timeout_s(self) -> float:
        return group_timeout(self.control.group, CPU).total_seconds()

    def _name(self, blamed: set[int]) -> str:
        """Those members for want of whom this rank has failed, or for want of whom they have; the other ranks are told."""
        described = {self._names[place]: self._describe(place) for place in sorted(blamed)}  # as they are now
        suspects = [self._members[place] for place in sorted(blamed)]
        lost = [rank for rank in name_lost(self.control.group, suspects, "") if rank is not None]
        elsewhere = [rank for rank in lost if rank not in self._names]
        here = [described.get(rank) or self._describe(self._names.index(rank)) for rank in lost if rank in self._names]
        return "; ".join([*here, *([f"{name_ranks(elsewhere)}, which other ranks have lost"] if elsewhere else [])])

    def _behind(self, posted_count: int, read_count: int) -> list[set[int]]:
        """Ranks that have yet to post, and those that have yet to read so many tickets; without what nobody waits for."""
        goals = ((self._board.posted, posted_count), (self._board.read, read_count))
        return [
            {rank for rank, count in enumerate(counts()) if count < goal}
            for counts, goal in goals
            if goal != _C.ShmBoard.NEVER
        ]

    def _tickets(self, number: int) -> list[_C.Ticket]:
        return list(map(self._board.ticket, range(self.num_slices), repeat(number)))

    def _fail(self, message: str) -> CollectiveError:
        """Tell the other ranks, and have every later call fail alike."""
        self._board.leave()
        self._failure = message
        return CollectiveError(message)

    def dead_ranks(self) -> set[int]:
        """The ranks of the group on this host whose process has ended before they could leave."""
        ended = [rank for rank in range(self.num_slices) if not self._is_alive(rank)]
        left = self._board.left()  # asked last: who leaves does so before its lock goes
        return {self._members[rank] for rank in ended if not left[rank]}

    def _is_lost(self, rank: int) -> bool:
        """Whether a rank will neither post nor read any more."""
        return self._board.left()[rank] or not self._is_alive(rank)

    def _describe(self, rank: int) -> str:
        name = f"rank {self._names[rank]}"
        if self._board.left()[rank]:
            return f"{name}, which gave up, dropped its model or came to its end"
        if not self._is_alive(rank):
            return f"{name}, whose process has ended"
        return f"{name}, which has not come within the group's timeout of {self._timeout_s():g} s: stopped, busy or diverged"

    def _is_alive(self, rank: int) -> bool:
        return rank == self.slice_index or _C.rank_lock_is_held(self._descriptor, rank)

    def check_posted(self, number: int) -> None:
        """Raise CollectiveError when ranks have posted different things for a ticket, as far as the board still knows."""
        tickets = self._tickets(number)
        if max(self._board.posted()) < number + _C.ShmBoard.CAPACITY:  # asked last: none has been overwritten so far
            self._check_alike(tickets)

    def _check_alike(self, tickets: list[_C.Ticket]) -> None:
        ranks_at: dict[tuple[int, int], list[int]] = {}
        for rank, ticket in enumerate(tickets):
            ranks_at.setdefault((ticket.kind, ticket.bytes), []).append(self._names[rank])
        if len(ranks_at) > 1:
            places = "; ".join(
                f"{name_ranks(ranks)} at the {self._labels.describe(what)} ({num_bytes} bytes)"
                for (what, num_bytes), ranks in ranks_at.items()
            )
            raise self._fail(f"transport shm: the ranks have diverged: {places}. {ADVICE}")

    def _buffer_of(self, tensor: Tensor) -> SharedBuffer:
        buffer = self._by_address.get(tensor.data_ptr())
        assert buffer is not None, "the shm transport works on buffers from its allocate() only"
        return buffer

    def _peers(self) -> list[int]:
        # Starting with the next rank spreads the first copies over all peers.
        return [(self.slice_index + i) % self.num_slices for i in range(1, self.num_slices)]


@dataclass(eq=False)
class _Read:
    """What this rank reads of its peers' buffers once all have posted a ticket.

    Attributes:
        number: of the ticket.
        tensor: this rank's own; None: nothing is read.
        read: is given what lies in each rank's buffer; None when it has been.
    """

    number: int
    kind: Kind
    tensor: Tensor | None
    read: Callable[[list[Tensor]], None] | None
    label: str


class PendingRead(PendingCollective):
    """A collective for which this rank reads its peers' buffers."""

    def __init__(self, transport: ShmTransport, read: _Read) -> None:
        self._transport = transport
        self._read = read

    @property
    def is_read(self) -> bool:
        """Whether this rank is through with it."""
        return self._transport.has_read(self._read.number)

    def finish(self) -> None:
        self._transport.read_through(self._read.number)

    def wait_until_read(self) -> None:
        self._transport.wait_until_read(self._read)


class _Arrival(PendingCollective):
    """An all-gather: what peers write into this rank's bucket is there when they have posted."""

    def __init__(self, transport: ShmTransport, number: int, label: str) -> None:
        self._transport = transport
        self._number = number
        self._label = label

    def finish(self) -> None:
        self._transport.read_through(self._number)  # peers may wait for that before they post this one
        self._transport.wait_until_posted(self._number, Kind.ALL_GATHER, self._label)
        self._transport.check_posted(self._number)


def _leave(pid: int, board: _C.ShmBoard, returns: Returns, descriptor: int) -> None:
    """When the transport is dropped."""
    if os.getpid() == pid:  # a forked child drops its copy too
        board.leave()
        returns.close()
        os.close(descriptor)
