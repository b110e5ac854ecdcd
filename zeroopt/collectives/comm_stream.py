"""The stream of a device on which collectives run beside what it computes, and who waits for whom.

    current stream   ──▶ fills a bucket ──┐                    ┌──▶ what uses the result
    communication stream                  └──▶ collective ──▶ sum, cast
                                          start              finish

There is one for reduces and gathers alike, of high priority, so that what follows a collective need not wait for blocks of large
kernels. Collectives of one process group run in the order of their start anyway: NCCL has one stream of its own for each
communicator. For gathers to overtake reduces they would need a second communicator, that is, another set of NCCL's buffers, and on
every rank one order of both; what would be gained is little, since gathers belong to the next forward, where no reduce is on its way.

**Which streams wait.** Whoever finishes a collective makes its own stream wait, and the stream on which it was started: in plain
torch, whoever waits for the stream of `step()` may read what it has computed. Finishing once more makes a further stream wait.

On the CPU there are no streams, and waiting for the backend is what blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..streams import Mark, current_stream, has_streams, let_wait
from .pending import PendingCollective


class CommStream:
    """Runs collectives behind what the current stream had to do when they were started.

    Args:
        device: of their tensors.
        blocks_host: whether the host is held up by waiting for the backend, as with Gloo. If not, a collective is waited for, by the
            communication stream alone, as soon as it is started, and what follows it is queued right behind it.
    """

    def __init__(self, device: torch.device, *, blocks_host: bool) -> None:
        self.device = device
        self.blocks_host = blocks_host
        self.is_there = has_streams(device)
        if self.is_there:
            module: Any = torch.get_device_module(device)
            self._stream = module.Stream(device, priority=-1)
            self._enter: Callable[[Any], AbstractContextManager[object]] = module.stream

    def entered(self) -> AbstractContextManager[object]:
        """Within it, this is the current stream."""
        return self._enter(self._stream) if self.is_there else nullcontext()

    def fall_in(self, *tensors: Tensor | None) -> None:
        """Come behind all that the current stream has to do so far, and tell the allocator that these tensors are used here, so that
        their memory goes to nobody else before."""
        if not self.is_there:
            return
        let_wait(self._stream, current_stream(self.device), self.device)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(self._stream)


class StreamCollective(PendingCollective):
    """A collective that has been started on the communication stream.

    Args:
        start: tells the backend there.
        follow: what the result has yet to go through there.
    """

    def __init__(
        self, stream: CommStream, start: Callable[[], PendingCollective], follow: Callable[[], None] | None
    ) -> None:
        self._stream = stream
        self._follow = follow
        self._started_on = (current_stream(stream.device),) if stream.is_there else ()
        self._done: Mark | None = None
        with stream.entered():
            self._work = start()
            if not stream.blocks_host:
                self._done = self._queue()

    def _queue(self) -> Mark:
        """Queue what follows, behind the backend, on the current stream. Tensors that were kept for it are let go."""
        self._work.finish()
        if self._follow is not None:
            self._follow()
        self._follow = None
        return Mark(self._stream.device)

    def finish(self) -> None:
        if self._done is None:
            with self._stream.entered():
                self._done = self._queue()
        self._done.wait(*self._started_on)

    def is_past(self) -> bool:
        return self._done is not None and self._done.is_past()

    def wait_until_read(self) -> None:
        self.finish()
