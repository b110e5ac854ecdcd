"""Pairwise exchange for Gloo: each slice goes straight to the rank that owns it.

Gloo has no reduce-scatter of its own: torch emulates it by an all-reduce, which moves twice the bytes. Here every rank
sends each peer the slice that this peer owns, (N-1)/N of the bucket in all, and sums what arrives in a fixed order, so that
the result does not depend on who was faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..profiling import named_range
from .base import Transport, slice_of
from .numbering import next_number
from .pending import PendingCollective, PendingWork, start_message
from .wire import PLAIN, Wire

T = TypeVar("T")

# Messages carry a number, so that a slice of one bucket is never taken for that of another. The numbers start high, out
# of the way of a user's own send and recv on the same group, and are used again long after a message was delivered. Each
# transport has its own, since the backward passes of two models may run in another order on another rank.
#
#     bit    24   23 .. 16    15 .. 0         25, 26   27 .. 29
#             1   transport   message number  kind     a digest of the size
#
# With kind and size among them, ranks that have diverged wait in vain rather than take one thing for another.
_FIRST_TAG = 1 << 24
_NUM_TAGS = 1 << 16
_NUM_TRANSPORTS = 1 << 8
REDUCE, GATHER, MAX, SCALAR = range(4)

# Large slices go in several messages: while one is summed, the next arrives. Messages of 4 MiB made an exchange that nothing
# else goes on beside a little faster, and a backward that goes on beside it slower.
MESSAGE_BYTES = 16 * 2**20
# Memory for what has arrived and waits for its sum. A bucket that needs more than that receives the rest when its sum is
# asked for, without overlap.
STAGING_BYTES = 32 * 2**20
_MESSAGE_ALIGNMENT = 64  # elements


class PairwiseTransport(Transport):
    """Exchanges slices by the process group's own point-to-point messages.

    Args:
        members: the ranks of the group that take part; all of them when None. Buckets have a slice for each of them. A member's
            place here is how methods know it.

    Attributes:
        place: of this rank among the members.
        slices: by place, which slice of a bucket that member owns.
        peers: the places of the others.
    """

    name = "pairwise"
    needs_gloo_on_cpu = True

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int] | None = None) -> None:
        super().__init__(group)
        self._members = list(range(group.size()) if members is None else members)
        self.place = self._members.index(self.control.rank)
        self.num_slices = len(self._members)
        self.order_slices(range(self.num_slices))
        self._first_tag = _FIRST_TAG + next_number(group, PairwiseTransport) % _NUM_TRANSPORTS * _NUM_TAGS
        self._exchanges = 0
        self.staging = StagingPool()
        # Starting with the next rank spreads the first messages over all peers.
        self.peers = [(self.place + i) % self.num_slices for i in range(1, self.num_slices)]

    def order_slices(self, slices: Sequence[int]) -> None:
        """Let each member, in their order, own one of these slices."""
        self.slices = slices
        self.slice_index = slices[self.place]

    def slice_at(self, full: Tensor, place: int) -> Tensor:
        """The slice of a bucket that a member owns, a view."""
        return slice_of(full, self.slices[place], self.num_slices)

    @classmethod
    def staging_bytes(cls, num_bytes: int, item_bytes: int, num_slices: int, num_hosts: int) -> int:
        slice_numel = num_bytes // item_bytes // num_slices
        parts = _Parts.of_slice(slice_numel, num_slices - 1, item_bytes)
        return parts.num_slots * parts.slot_bytes

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        return _PairwiseReduce(self, full, out, base, wire, label)

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        numel = max(1, MESSAGE_BYTES // full.element_size())
        parts = [torch.split(self.slice_at(full, place), numel) for place in range(self.num_slices)]
        tag = self.take_tags(len(parts[0]), GATHER, full.nbytes)
        works = []
        for number, own in enumerate(parts[self.place]):
            works += self.receive({peer: parts[peer][number] for peer in self.peers}, tag + number)
            works += self.send(dict.fromkeys(self.peers, own), tag + number)
        return PendingWork(f"transport {self.name}, all-gather of {label}", works, (full,), group=self.control.group)

    def start_max(self, flags: Tensor, out: Tensor, *, label: str = "flags") -> PendingCollective:
        # Straight between all pairs, as scalars too, for an all_reduce that fails does not say for want of which rank.
        tag = self.take_tags(1, MAX, flags.nbytes)
        received = {peer: torch.empty_like(flags) for peer in self.peers}
        works = self.receive(received, tag) + self.send(dict.fromkeys(self.peers, flags), tag)
        pending = PendingWork(
            f"transport {self.name}, max of {label}", works, (flags, received), group=self.control.group
        )
        return _PairwiseMax(pending, [flags, *received.values()], out)

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        tag = self.take_tags(1, SCALAR, value.nbytes)
        own = value.reshape(1)
        received = {peer: torch.empty_like(own) for peer in self.peers}
        works = self.receive(received, tag) + self.send(dict.fromkeys(self.peers, own), tag)
        what = f"transport {self.name}, gather of {label}"
        PendingWork(what, works, (own, received), group=self.control.group).finish()
        return torch.cat(self.in_order_of_slices([received.get(place, own) for place in range(self.num_slices)]))

    def in_order_of_slices(self, of_members: Sequence[T]) -> list[T]:
        """What belongs to each member, in the order of the slices that they own."""
        owners = sorted(range(self.num_slices), key=self.slices.__getitem__)
        return [of_members[place] for place in owners]

    def take_tags(self, count: int, kind: int, num_bytes: int) -> int:
        """The first of `count` numbers that no message on its way has, for a bucket of so many bytes."""
        if self._exchanges % _NUM_TAGS + count > _NUM_TAGS:
            self._exchanges += _NUM_TAGS - self._exchanges % _NUM_TAGS
        tag = self._first_tag + self._exchanges % _NUM_TAGS
        self._exchanges += count
        return tag | kind << 25 | num_bytes // 64 % 7 << 27

    def give_up(self, reason: str) -> None:
        self.break_off(self.peers)

    def break_off(self, peers: Sequence[int]) -> None:
        """Let these members fail in what they wait for."""
        # A receive that times out breaks the connection, of which the peer hears at once.
        for peer in peers:
            nothing = torch.empty(1, dtype=torch.uint8, device="cpu")
            works = self.receive({peer: nothing}, self.take_tags(1, GATHER, 0))
            PendingWork("giving up", works, (nothing,)).abandon()

    def receive(self, incoming: dict[int, Tensor], tag: int) -> list[tuple[int | None, dist.Work]]:
        """Start receiving from peers."""
        ranks = {peer: self._members[peer] for peer in incoming}
        return [
            (ranks[peer], start_message(self.control.group.recv, tensor, ranks[peer], tag))
            for peer, tensor in incoming.items()
        ]

    def send(self, outgoing: dict[int, Tensor], tag: int) -> list[tuple[int | None, dist.Work]]:
        """Start sending to peers."""
        ranks = {peer: self._members[peer] for peer in outgoing}
        self.sent_bytes += sum(tensor.nbytes for tensor in outgoing.values())
        return [
            (ranks[peer], start_message(self.control.group.send, tensor, ranks[peer], tag))
            for peer, tensor in outgoing.items()
        ]


class _PairwiseReduce(PendingCollective):
    """A reduce-scatter in parts: for each part of the own slice, a message from every peer, which are then summed.

    Messages arrive in slots of the staging memory. When a part has been summed, its slot is free for a later one.
    """

    def __init__(
        self, transport: PairwiseTransport, full: Tensor, out: Tensor, base: Tensor | None, wire: Wire, label: str
    ) -> None:
        self._transport = transport
        self._what = f"transport {transport.name}, reduce-scatter of {label}"
        self._label = label
        self._full, self._out, self._base, self._wire = full, out, base, wire
        num_peers, item_bytes = len(transport.peers), full.element_size()
        self._slice_numel = full.numel() // transport.num_slices
        self._comes_in_parts = self._slice_numel == out.numel()  # else the wire knows nothing of parts
        parts = _Parts.of_slice(self._slice_numel, num_peers, item_bytes, cut=self._comes_in_parts)
        self._part_numel, self._num_parts = parts.numel, parts.count
        self._slot_bytes, self._num_slots = parts.slot_bytes, parts.num_slots
        self._next_part = 0
        self._staging: Tensor | None = transport.staging.take(self._num_slots * self._slot_bytes)
        self._tag = transport.take_tags(self._num_parts, REDUCE, full.nbytes)
        self._arriving = deque(self._receive(part) for part in range(self._num_slots))
        sends: list[tuple[int | None, dist.Work]] = []
        for part in range(self._num_parts):
            outgoing = {peer: self._part_of(transport.slice_at(full, peer), part) for peer in transport.peers}
            sends += transport.send(outgoing, self._tag + part)
        self._sends = PendingWork(self._what, sends, (full,), group=transport.control.group)

    def finish(self) -> None:
        while self._next_part < self._num_parts:
            part = self._next_part
            self._arriving[0].finish()  # when it fails, it is still the first
            self._arriving.popleft()
            self._add(part)
            if part + self._num_slots < self._num_parts:
                self._arriving.append(self._receive(part + self._num_slots))
            self._next_part += 1
        if self._staging is not None:
            self._transport.staging.give_back(self._staging)
            self._staging = None

    def wait_until_read(self) -> None:
        self._sends.finish()

    def _receive(self, part: int) -> PendingWork:
        works = self._transport.receive(self._incoming(part), self._tag + part)
        return PendingWork(self._what, works, (self._staging,), group=self._transport.control.group)

    def _incoming(self, part: int) -> dict[int, Tensor]:
        """Where the peers' messages for a part of the own slice arrive."""
        assert self._staging is not None
        peers, numel = self._transport.peers, self._part_of(self._transport.own_slice(self._full), part).numel()
        first_byte = part % self._num_slots * self._slot_bytes
        slot = self._staging[first_byte : first_byte + len(peers) * numel * self._full.element_size()]
        return dict(zip(peers, torch.split(slot.view(self._full.dtype), numel), strict=True))

    def _add(self, part: int) -> None:
        incoming = self._incoming(part)
        own = self._part_of(self._transport.own_slice(self._full), part)
        slices = [incoming.get(place, own) for place in range(self._transport.num_slices)]
        out, base = self._out, self._base
        if self._comes_in_parts:
            out, base = self._part_of(out, part), None if base is None else self._part_of(base, part)
        with named_range("sum", self._label):
            self._wire.combine(slices, out, base)

    def _part_of(self, tensor: Tensor, part: int) -> Tensor:
        return tensor[part * self._part_numel : (part + 1) * self._part_numel]


@dataclass(frozen=True)
class _Parts:
    """How a slice travels.

    Attributes:
        numel: of a part, in elements; of the last one there may be fewer.
        count: of parts.
        slot_bytes: for one part of every peer.
        num_slots: that exist at once.
    """

    numel: int
    count: int
    slot_bytes: int
    num_slots: int

    @classmethod
    def of_slice(cls, slice_numel: int, num_peers: int, item_bytes: int, *, cut: bool = True) -> _Parts:
        """Of a slice of so many elements, in one piece where it must not be cut."""
        numel = _part_numel(slice_numel, num_peers, item_bytes) if cut else slice_numel
        count = -(-slice_numel // numel)
        slot_bytes = num_peers * numel * item_bytes
        return cls(numel, count, slot_bytes, min(count, max(1, STAGING_BYTES // max(1, slot_bytes))))


def _part_numel(slice_numel: int, num_peers: int, item_bytes: int) -> int:
    """Elements of a message: few enough for one of every peer to fit into the staging memory."""
    fitting = (
        min(MESSAGE_BYTES, STAGING_BYTES // max(1, num_peers)) // item_bytes // _MESSAGE_ALIGNMENT * _MESSAGE_ALIGNMENT
    )
    return min(max(1, slice_numel), max(fitting, _MESSAGE_ALIGNMENT))


class _PairwiseMax(PendingCollective):
    """The largest of what the ranks have sent one another, once it is there."""

    def __init__(self, pending: PendingWork, flags: list[Tensor], out: Tensor) -> None:
        self._pending = pending
        self._flags = flags
        self._out = out

    def finish(self) -> None:
        self._pending.finish()
        if self._flags:
            torch.amax(torch.stack(self._flags), dim=0, out=self._out)
            self._flags = []


class StagingPool:
    """Memory for what arrives before it is summed; holds as many buffers as were ever in use at once."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """A uint8 buffer of at least `num_bytes` bytes."""
        for i, buffer in enumerate(self._free):
            if buffer.numel() >= num_bytes:
                return self._free.pop(i)
        if self._free:  # too small for this bucket: replace it rather than keep both
            self._free.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)
