"""On which streams of a device the gradients of each bucket come and are packed, so that none is missed.

Autograd runs each parameter's hook on the stream on which the forward used it, so the gradients of one bucket may come on several.
They wait in `param.grad` until somebody packs all of them, who comes behind all of these streams; and whoever starts the reduce
comes behind that.

    stream 1   gradient waits ──┐
    stream 2   gradient waits ──┴─▶ opens the buffer, packs ──┐
    stream 3                                                  └─▶ starts the reduce
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..storage.bucket import Bucket
from ..streams import current_stream, has_streams, let_wait, stream_teller


class PackingStreams:
    """Those of one backward, by index of the bucket. On the CPU it does nothing.

    Attributes:
        last: on which the last gradient of each bucket has come that waits, by what tells streams apart. None: none waits.
        are_left: gradients have stayed, on whatever streams they came, until a later backward takes them along.
        tell: tells the current stream likewise.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._device = buckets[0].device if buckets else torch.device("cpu")
        self.are_there = has_streams(self._device)
        self._count = len(buckets)
        self.tell = stream_teller(self._device)
        self.forget()

    def forget(self) -> None:
        """A backward is through. The next one may run on other streams, that of a CUDA graph, say, which may wait for no other."""
        self.last: list[object | None] = [None] * self._count
        if self.are_there:
            # Streams by what tells them apart.
            self._opened_on: list[dict[object, Any]] = [{} for _ in range(self._count)]
            self._came_on: list[dict[object, Any]] = [{} for _ in range(self._count)]  # gradients that wait
            # Of which buckets some have come on other streams than the one that has joined them.
            self._come_from_others = bytearray(self._count)
        self.are_left = False

    def note_opened(self, bucket: int) -> None:
        """The current stream has got a buffer for a bucket, which nobody else packs."""
        if self.are_there:
            self._opened_on[bucket] = {self.tell(): current_stream(self._device)}

    def note_waiting(self, bucket: int) -> None:
        """A gradient has come, and stays where it is until the bucket has a buffer."""
        if self.are_there:
            here = self.last[bucket] = self.tell()
            if here not in self._came_on[bucket]:
                self._came_on[bucket][here] = current_stream(self._device)

    def note_left(self) -> None:
        """Gradients stay until a later backward takes them along."""
        self.are_left = True

    def join(self, bucket: int) -> None:
        """Let the current stream come behind all that others have done for a bucket."""
        if not self.are_there:
            return
        here, came_on = self.tell(), self._came_on[bucket]
        if any(key != here for key in came_on):
            self._come_from_others[bucket] = 1
        for key, stream in {**came_on, **self._opened_on[bucket]}.items():
            if key != here:
                let_wait(current_stream(self._device), stream, self._device)
        came_on.clear()
        self.last[bucket] = None

    def note_all_read(self, bucket: int, grads: Iterable[Tensor]) -> None:
        """All gradients of a bucket are, after `join`. The allocator need not hear of those that have come on this very stream: where another
        one has made them, autograd has told it."""
        if self.are_there and (self.are_left or self._come_from_others[bucket]):
            self.note_read(grads)

    def note_read(self, grads: Iterable[Tensor]) -> None:
        """Gradients that have waited are read on the current stream, and dropped then."""
        if self.are_there:
            stream = current_stream(self._device)
            for grad in grads:
                if grad.untyped_storage().resizable():  # as `note_use` says
                    grad.record_stream(stream)
