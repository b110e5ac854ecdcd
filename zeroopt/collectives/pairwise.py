"""Pairwise exchange for Gloo: each slice goes straight to the rank that owns it.

Gloo has no reduce-scatter of its own: torch emulates it by an all-reduce, which moves twice the bytes. Here every rank
sends each peer the slice that this peer owns, (N-1)/N of the bucket in all, and sums what arrives in a fixed order, so that
the result does not depend on who was faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from .base import PendingCollective, PendingWork, Transport, slice_of

# Messages carry a number, so that a slice of one bucket is never taken for that of another. The numbers start high, out
# of the way of a user's own send and recv on the same group, and are used again long after a message was delivered. Each
# transport has its own, since the backward passes of two models may run in another order on another rank.
_FIRST_TAG = 1 << 24
_NUM_TAGS = 1 << 16
_NUM_TRANSPORTS = 1 << 8
_transports_of_group: Counter[str] = Counter()

# Memory for slices that have arrived and wait for their sum. A bucket that needs more is received in rounds, which costs
# overlap: the second round begins when the sum of the first is asked for.
STAGING_BYTES = 32 * 2**20
_CHUNK_ALIGNMENT = 64  # elements


class PairwiseTransport(Transport):
    """Exchanges slices by the process group's own point-to-point messages.

    Args:
        members: the ranks of the group that take part; all of them when None. `rank` and `world_size` are counted among
            them.
    """

    name = "pairwise"

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int] | None = None) -> None:
        super().__init__(group)
        self._members = list(range(group.size()) if members is None else members)
        self.rank = self.slice_index = self._members.index(group.rank())
        self.world_size = len(self._members)
        self._first_tag = _FIRST_TAG + _transports_of_group[group.group_name] % _NUM_TRANSPORTS * _NUM_TAGS
        _transports_of_group[group.group_name] += 1
        self._exchanges = 0
        self.staging = StagingPool()
        # Starting with the next rank spreads the first messages over all peers.
        self.peers = [(self.rank + i) % self.world_size for i in range(1, self.world_size)]

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, label: str = "a bucket"
    ) -> PendingCollective:
        return _PairwiseReduce(self, full, out, base, label)

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        tag = self.take_tags(1)
        incoming = {peer: slice_of(full, peer, self.world_size) for peer in self.peers}
        works = self.receive(incoming, tag) + self.send(dict.fromkeys(self.peers, self.own_slice(full)), tag)
        return PendingWork(f"transport {self.name}, all-gather of {label}", works, (full,))

    def take_tags(self, count: int) -> int:
        """The first of `count` numbers that no message on its way has."""
        if self._exchanges % _NUM_TAGS + count > _NUM_TAGS:
            self._exchanges += _NUM_TAGS - self._exchanges % _NUM_TAGS
        tag = self._first_tag + self._exchanges % _NUM_TAGS
        self._exchanges += count
        return tag

    def receive(self, incoming: dict[int, Tensor], tag: int) -> list[tuple[int | None, dist.Work]]:
        """Start receiving from peers."""
        ranks = {peer: self._members[peer] for peer in incoming}
        return [(ranks[peer], self.group.recv([tensor], ranks[peer], tag)) for peer, tensor in incoming.items()]

    def send(self, outgoing: dict[int, Tensor], tag: int) -> list[tuple[int | None, dist.Work]]:
        """Start sending to peers."""
        ranks = {peer: self._members[peer] for peer in outgoing}
        self.sent_bytes += sum(tensor.nbytes for tensor in outgoing.values())
        return [(ranks[peer], self.group.send([tensor], ranks[peer], tag)) for peer, tensor in outgoing.items()]


class _PairwiseReduce(PendingCollective):
    """A reduce-scatter in rounds, each of which receives a chunk of the own slice from every peer and sums it."""

    def __init__(
        self, transport: PairwiseTransport, full: Tensor, out: Tensor, base: Tensor | None, label: str
    ) -> None:
        self._transport = transport
        self._what = f"transport {transport.name}, reduce-scatter of {label}"
        self._full, self._out, self._base = full, out, base
        self._done = False
        num_peers = len(transport.peers)
        fitting = STAGING_BYTES // (num_peers * full.element_size()) // _CHUNK_ALIGNMENT * _CHUNK_ALIGNMENT
        self._chunk = min(out.numel(), max(fitting, _CHUNK_ALIGNMENT))
        starts = range(0, out.numel(), self._chunk) if out.numel() else []
        self._tag = transport.take_tags(len(starts))
        self._staging = transport.staging.take(num_peers * self._chunk * full.element_size())
        sends: list[tuple[int | None, dist.Work]] = []
        for round_number, start in enumerate(starts):
            outgoing = {
                peer: self._chunk_of(slice_of(full, peer, transport.world_size), start) for peer in transport.peers
            }
            sends += transport.send(outgoing, self._tag + round_number)
        self._sends = PendingWork(self._what, sends, (full,))
        self._rounds = list(enumerate(starts))
        self._received = self._receive(*self._rounds[0]) if self._rounds else None

    def finish(self) -> None:
        if self._done:
            return
        for number, start in self._rounds:
            if number > 0:
                self._received = self._receive(number, start)
            assert self._received is not None
            self._received.finish()
            self._add(start)
        self._sends.finish()
        self._transport.staging.give_back(self._staging)
        self._done = True

    def _receive(self, number: int, start: int) -> PendingWork:
        incoming = self._incoming(start)
        return PendingWork(self._what, self._transport.receive(incoming, self._tag + number), (self._staging,))

    def _incoming(self, start: int) -> dict[int, Tensor]:
        """Where the peers' chunks of the own slice arrive."""
        numel = min(self._chunk, self._out.numel() - start)
        peers = self._transport.peers
        received = self._staging[: len(peers) * numel * self._full.element_size()].view(self._full.dtype)
        return dict(zip(peers, torch.split(received, numel), strict=True))

    def _add(self, start: int) -> None:
        own = self._chunk_of(self._transport.own_slice(self._full), start)
        incoming = self._incoming(start)
        slices = [incoming.get(rank, own) for rank in range(self._transport.world_size)]
        base = None if self._base is None else self._chunk_of(self._base, start)
        ops.reduce(slices, self._chunk_of(self._out, start), base=base)

    def _chunk_of(self, tensor: Tensor, start: int) -> Tensor:
        return tensor[start : start + self._chunk]


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
        return torch.empty(num_bytes, dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)
