"""torch.distributed's own reduce-scatter and all-gather, for backends that have real ones (NCCL).

They run on a communication stream, behind an event on the stream that filled the bucket, and whoever finishes one makes its
own stream wait for an event: the host waits for nothing. On the CPU, streams and events are empty shells, and waiting for
the backend is what blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Transport
from .failure import the_other_rank
from .pending import PendingCollective, PendingWork
from .site import Site
from .wire import PLAIN, Wire

# torch 2.13 renamed both and warns when the former names are called.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchTransport(Transport):
    """Hands every bucket to the process group's backend as it is.

    `sent_bytes` counts what a ring sends, (N-1)/N of a bucket; a backend that emulates a collective sends more.
    """

    name = "torch"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group)
        self._device_module = torch.get_device_module(device)
        self._stream = self._device_module.Stream()
        self._missing = the_other_rank(group)  # where a collective fails

    @classmethod
    def connect(cls, site: Site) -> Transport:
        return cls(site.group, site.device)

    @classmethod
    def staging_bytes(cls, num_bytes: int, item_bytes: int, num_slices: int, num_hosts: int) -> int:
        return num_bytes // num_slices  # a sum that has yet to be added to another one, or widened

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        if not wire.backend_sums:
            return self._start_exchange(full, out, base, wire, label)
        self._let_stream_wait()
        with self._device_module.stream(self._stream):
            # The sum has a place of its own when it is added to an earlier one, or is wider than what travels.
            apart = base is not None or out.dtype is not full.dtype
            total = torch.empty_like(out, dtype=full.dtype) if apart else out
            work = _reduce_scatter(total, full, group=self.control.group, async_op=True)
        self._count(full)
        pending = PendingWork(f"transport torch, reduce-scatter of {label}", [(self._missing, work)], (full, out))
        return _StreamCollective(self, pending, partial(_add, total, base, out) if apart else None)

    def _start_exchange(
        self, full: Tensor, out: Tensor, base: Tensor | None, wire: Wire, label: str
    ) -> PendingCollective:
        """Let every rank have all slices that it owns, since no backend can sum them."""
        self._let_stream_wait()
        with self._device_module.stream(self._stream):
            received = torch.empty_like(full)
            # As bytes: not every backend knows all dtypes.
            work = dist.all_to_all_single(
                received.view(torch.uint8), full.view(torch.uint8), group=self.control.group, async_op=True
            )
        self._count(full)
        pending = PendingWork(f"transport torch, exchange of {label}", [(self._missing, work)], (full, received))
        slices = received.view(self.num_slices, -1).unbind()
        return _StreamCollective(self, pending, partial(wire.combine, slices, out, base))

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        self._let_stream_wait()
        with self._device_module.stream(self._stream):
            work = _all_gather(full, self.own_slice(full), group=self.control.group, async_op=True)
        self._count(full)
        pending = PendingWork(f"transport torch, all-gather of {label}", [(self._missing, work)], (full,))
        return _StreamCollective(self, pending, None)

    def finish_on_stream(self, pending: PendingWork, follow: Callable[[], None] | None) -> None:
        """Queue what follows a collective on the communication stream, and let the current stream wait for it."""
        with self._device_module.stream(self._stream):
            pending.finish()
            if follow is not None:
                follow()
            done = self._device_module.Event()
            done.record(self._stream)
        done.wait(self._device_module.current_stream())

    def _let_stream_wait(self) -> None:
        filled = self._device_module.Event()
        filled.record(self._device_module.current_stream())
        filled.wait(self._stream)

    def _count(self, full: Tensor) -> None:
        self.sent_bytes += full.nbytes // self.num_slices * (self.num_slices - 1)


def _add(total: Tensor, base: Tensor | None, out: Tensor) -> None:
    if base is None:
        out.copy_(total)
    else:
        torch.add(base, total, out=out)


class _StreamCollective(PendingCollective):
    """Keeps its tensors until it is finished: from then on the current stream, on which their memory may be given to
    others, waits for the communication stream."""

    def __init__(self, transport: TorchTransport, pending: PendingWork, follow: Callable[[], None] | None) -> None:
        self._transport: TorchTransport | None = transport
        self._pending = pending
        self._follow = follow

    def finish(self) -> None:
        if self._transport is None:
            return
        self._transport.finish_on_stream(self._pending, self._follow)
        self._transport = self._follow = None
