"""torch.distributed's own reduce-scatter and all-gather, for backends that have real ones (NCCL).

They run on a communication stream, see `comm_stream`. With NCCL the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Transport
from .comm_stream import CommStream, StreamCollective
from .failure import named_failures, the_other_rank
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
        with self._stream.entered(), named_failures(what, self._missing):
            work = collective(group=self.control.group, async_op=True)
        return StreamCollective(self._stream, PendingWork(what, [(self._missing, work)], keep), follow)

    def _count(self, full: Tensor) -> None:
        self.sent_bytes += full.nbytes // self.num_slices * (self.num_slices - 1)


def _add(total: Tensor, base: Tensor | None, out: Tensor) -> None:
    if base is None:
        out.copy_(total)
    else:
        torch.add(base, total, out=out)
