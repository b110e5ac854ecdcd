"""Pairwise exchange for Gloo: each slice goes straight to the rank that owns it.

Gloo has no reduce-scatter of its own: torch emulates it by an all-reduce, which moves twice the bytes. Here every rank
sends each peer the slice that this peer owns, (N-1)/N of the bucket in all, and sums what arrives in rank order, so that
the result does not depend on who was faster.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from .base import PendingCollective, Transport, slice_of

# Messages carry a number, so that a slice of one bucket is never taken for that of another. The numbers start high, out
# of the way of a user's own send and recv on the same group, and are used again long after a message was delivered. Each
# transport has its own, since the backward passes of two models may run in another order on another rank.
_FIRST_TAG = 1 << 24
_NUM_TAGS = 1 << 16
_NUM_TRANSPORTS = 1 << 8
_transports_of_group: Counter[str] = Counter()


class PairwiseTransport(Transport):
    """Exchanges slices by the process group's own point-to-point messages."""

    name = "pairwise"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group
        self._first_tag = _FIRST_TAG + _transports_of_group[group.group_name] % _NUM_TRANSPORTS * _NUM_TAGS
        _transports_of_group[group.group_name] += 1
        self._started = 0
        self._staging = StagingPool()
        # Starting with the next rank spreads the first messages over all peers.
        self._peers = [(self.rank + i) % self.world_size for i in range(1, self.world_size)]

    def start_reduce_scatter(self, full: Tensor, out: Tensor, base: Tensor | None = None) -> PendingCollective:
        staging = self._staging.take(len(self._peers) * out.numel() * full.element_size())
        received = staging[: len(self._peers) * out.numel() * full.element_size()].view(full.dtype)
        incoming = {peer: received.narrow(0, i * out.numel(), out.numel()) for i, peer in enumerate(self._peers)}
        outgoing = {peer: slice_of(full, peer, self.world_size) for peer in self._peers}
        works = self._exchange(outgoing, incoming)
        slices = [incoming.get(rank, self.own_slice(full)) for rank in range(self.world_size)]
        return _PendingReduce(works, slices, out, base, self._staging, staging)

    def start_all_gather(self, full: Tensor) -> PendingCollective:
        incoming = {peer: slice_of(full, peer, self.world_size) for peer in self._peers}
        outgoing = dict.fromkeys(self._peers, self.own_slice(full))
        return _PendingExchange(self._exchange(outgoing, incoming))

    def _exchange(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> list[dist.Work]:
        tag = self._first_tag + self._started % _NUM_TAGS
        self._started += 1
        works = []
        for peer in self._peers:
            works.append(self._group.recv([incoming[peer]], peer, tag))
            works.append(self._group.send([outgoing[peer]], peer, tag))
            self.sent_bytes += outgoing[peer].nbytes
        return works


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


@dataclass
class _PendingExchange:
    works: list[dist.Work]

    def finish(self) -> None:
        for work in self.works:
            work.wait()


@dataclass
class _PendingReduce:
    works: list[dist.Work]
    slices: list[Tensor]
    out: Tensor
    base: Tensor | None
    pool: StagingPool
    staging: Tensor

    def finish(self) -> None:
        for work in self.works:
            work.wait()
        ops.reduce(self.slices, self.out, base=self.base)
        self.pool.give_back(self.staging)
