"""torch.distributed's own reduce-scatter and all-gather, for backends that have real ones (NCCL).

They run on a communication stream, see `comm_stream`. With NCCL the host waits for nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Transport
from .comm_stream import CommStream, StreamCollective
from .exchange import Exchange, Pieces, cut_pieces
from .failure import the_other_rank
from .lost import named_failures
from .pending import PendingCollective, PendingWork
from .renamed import all_gather_flat, reduce_scatter_flat
from .scratch import Scratch
from .site import Site
from .wire import PLAIN, Wire


class TorchTransport(Transport):
    """Hands every bucket to the process group's backend as it is.

    `sent_bytes` counts what a ring sends, (N-1)/N of a bucket; a backend that emulates a collective sends more.

    Attributes:
        sums_here: slices are summed by the ranks that own them, rather than by the backend.
        allocator: the backend that buckets take their memory from, registered with it; None: torch's allocator.
    """

    name = "torch"
    sums_here = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group)
        self._stream = CommStream(device, blocks_host=Site(group, device).blocks_host)
        self._scratch = Scratch(self._stream)
        # If not, the next one has what it needs when the one before is through with it.
        self.needs_staging = self._stream.blocks_host
        self.is_queued = not self._stream.blocks_host
        self._missing = the_other_rank(group)  # where a collective fails
        self.allocator: Any = None

    @classmethod
    def connect(cls, site: Site) -> Transport:
        return cls(site.group, site.device)

    @classmethod
    def staging_bytes(cls, num_bytes: int, item_bytes: int, num_slices: int, num_hosts: int) -> int:
        return num_bytes // num_slices  # a sum that has yet to be added to another one, or widened

    @property
    def sums_in_tree(self) -> bool:
        return self.sums_here

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> Tensor:
        if self.allocator is None:
            return super().allocate(numel, dtype, device, shared=shared)
        buffer: Tensor = self.allocator.allocate_tensor(numel, dtype=dtype, device=device)
        return buffer.zero_()

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        if self.sums_here or not wire.backend_sums:
            return self._start_exchange(full, out, base, wire, label)
        self._count(full)
        self._stream.fall_in(full, out, base)
        # The sum has a place of its own when it is added to an earlier one, or is wider than what travels.
        apart = base is not None or out.dtype is not full.dtype
        total = self._scratch.take(out.numel(), full) if apart else out
        return self._start(
            f"reduce-scatter of {label}",
            partial(reduce_scatter_flat, total, full),
            (full, out),
            partial(_add, total, base, out) if apart else None,
        )

    def _start_exchange(
        self, full: Tensor, out: Tensor, base: Tensor | None, wire: Wire, label: str
    ) -> PendingCollective:
        """Let every rank have all slices that it owns, and sum them."""
        self._count(full)
        self._stream.fall_in(full, out, base)
        received = self._scratch.take(full.numel(), full)
        slices = received.view(self.num_slices, -1).unbind()
        return self._start(
            f"exchange of {label}",
            # As bytes: not every backend knows all dtypes.
            partial(dist.all_to_all_single, received.view(torch.uint8), full.view(torch.uint8)),
            (full, received),
            partial(wire.combine, slices, out, base),
        )

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        self._count(full)
        self._stream.fall_in(full)
        return self._start(f"all-gather of {label}", partial(all_gather_flat, full, self.own_slice(full)), (full,))

    def start_max(self, flags: Tensor, out: Tensor, *, label: str = "flags") -> PendingCollective:
        self._stream.fall_in(flags, out)
        with self._stream.entered():
            out.copy_(flags)
        return self._start(f"max of {label}", partial(dist.all_reduce, out, dist.ReduceOp.MAX), (flags, out))

    def make_exchange(self) -> Exchange:
        return _StreamExchange(self, self.ranks_by_slice())

    def start_all_to_all(
        self,
        source: Tensor,
        target: Tensor,
        receives: Sequence[int],
        sends: Sequence[int],
        give: Callable[[Tensor], Tensor],
        take: Callable[[Tensor, Tensor], None],
        label: str,
    ) -> PendingCollective:
        """Start to exchange pieces with all ranks, in their order.

        Args:
            source, target: 1-D, where pieces are and where they get to.
            receives, sends: elements, by rank.
            give: takes the source, and gives the pieces that go, in the order of ranks, 1-D. On the communication stream.
            take: puts the pieces that come, 1-D, into the target, its first argument. Likewise.
        """
        self._stream.fall_in(source, target)
        received = self._scratch.take(sum(receives), source)
        in_bytes, out_bytes = ([numel * source.itemsize for numel in pieces] for pieces in (sends, receives))

        def start(**options: Any) -> dist.Work:
            # As bytes: not every backend knows all dtypes.
            going, coming = give(source).view(torch.uint8), received.view(torch.uint8)
            work: dist.Work = dist.all_to_all_single(coming, going, out_bytes, in_bytes, **options)
            return work

        return self._start(f"all-to-all of {label}", start, (source, received), partial(take, target, received))

    def flush(self) -> None:
        self._scratch.drop()

    def _start(
        self,
        what: str,
        collective: Callable[..., dist.Work],
        keep: tuple[Tensor, ...],
        follow: Callable[[], None] | None = None,
    ) -> PendingCollective:
        """Start a collective on the communication stream, which has fallen in.

        Args:
            keep: its tensors.
            follow: what its result has yet to go through.
        """
        what = f"transport {self.name}, {what}"
        group, on_device = self.control.group, self._stream.device.type != "cpu"

        def start() -> PendingCollective:
            with named_failures(what, self._missing, group=group):
                work = collective(group=group, async_op=True)
            return PendingWork(what, [(self._missing, work)], keep, group=group, on_device=on_device)

        return StreamCollective(self._stream, start, follow)

    def _count(self, full: Tensor) -> None:
        self.sent_bytes += full.nbytes // self.num_slices * (self.num_slices - 1)


class _StreamExchange(Exchange):
    """By the backend's all-to-all, on the transport's communication stream.

    Args:
        rank_of_slice: ranks of the group, by slice.
    """

    def __init__(self, transport: TorchTransport, rank_of_slice: Sequence[int]) -> None:
        self._transport: TorchTransport = weakref.proxy(transport)  # which has this
        self._slice_of_rank = {rank: index for index, rank in enumerate(rank_of_slice)}
        self._is_in_order = all(rank == index for index, rank in enumerate(rank_of_slice))

    def start(
        self, source: Tensor, target: Tensor, sends: Pieces, receives: Pieces, *, label: str = "a bucket"
    ) -> PendingCollective:
        transport = self._transport
        transport.count_exchanged(source.nbytes - sends.get(transport.slice_index, 0) * source.itemsize)
        return transport.start_all_to_all(
            source,
            target,
            self._by_rank(receives),
            self._by_rank(sends),
            partial(self._give, sends),
            partial(self._take, receives),
            label,
        )

    def _give(self, sends: Pieces, source: Tensor) -> Tensor:
        if self._is_in_order:
            return source
        pieces = cut_pieces(source, sends)
        return torch.cat([source[:0], *(pieces[index] for index in self._in_order(sends))])

    def _take(self, receives: Pieces, target: Tensor, received: Tensor) -> None:
        if self._is_in_order:
            target.copy_(received)
            return
        order = self._in_order(receives)
        places = cut_pieces(target, receives)
        for index, piece in zip(order, torch.split(received, [receives[index] for index in order]), strict=True):
            places[index].copy_(piece)

    def _in_order(self, pieces: Pieces) -> list[int]:
        return [index for _, index in sorted(self._slice_of_rank.items()) if index in pieces]

    def _by_rank(self, pieces: Pieces) -> list[int]:
        size = self._transport.control.size
        return [pieces.get(self._slice_of_rank.get(rank, -1), 0) for rank in range(size)]


def _add(total: Tensor, base: Tensor | None, out: Tensor) -> None:
    if base is None:
        out.copy_(total)
    else:
        torch.add(base, total, out=out)
