"""Gradients that have come and lie apart, until their bucket has a buffer or, on a device, is complete."""

from __future__ import annotations

from itertools import islice

from .activations import Activations
from .rehearsal import Rehearsal


def waiting_gradients(
    rehearsal: Rehearsal, activations: Activations, num_buffers: int, *, packs_together: bool
) -> list[int]:
    """Bytes of gradients that have come and lie in no buffer, for each of the peaks of a pass.

    Args:
        num_buffers: of the pool, where buckets borrow their buffers.
        packs_together: a bucket's gradients move into it at once when the last one has come, as they do on a device.
    """
    backward = _Backward(rehearsal, num_buffers, packs_together=packs_together)
    waiting = [0]
    for name, num_bytes in zip(activations.order, activations.gradients, strict=True):
        backward.take_up(name, num_bytes)
        waiting.append(sum(backward.apart))
    return waiting


class _Backward:
    """The rules of `GradientReducer`: a bucket takes a buffer of the pool when it is its turn, and before only where buckets before it
    need none. Where every bucket has a buffer of its own, none waits for one.

    Attributes:
        apart: by bucket, bytes of gradients that lie in no buffer.
    """

    def __init__(self, rehearsal: Rehearsal, num_buffers: int, *, packs_together: bool) -> None:
        buckets = rehearsal.buckets
        self._bucket_of = {managed.name: bucket.index for bucket in buckets for managed in bucket.params}
        self._missing = [len(bucket.params) for bucket in buckets]
        self._is_open = [not store.borrows for store in rehearsal.stores]
        self._idle = num_buffers
        self._next = 0
        self._packs_together = packs_together
        self.apart = [0] * len(buckets)

    def take_up(self, name: str, num_bytes: int) -> None:
        """A gradient is complete."""
        if name not in self._bucket_of:
            return
        bucket = self._bucket_of[name]
        if self._packs_together or not self._open(bucket):
            self.apart[bucket] += num_bytes
        self._missing[bucket] -= 1
        is_early = self._missing[bucket] == 0 and bucket != self._next
        if self._packs_together and is_early and self._open(bucket):
            self.apart[bucket] = 0
        while self._next < len(self._missing) and self._missing[self._next] == 0:
            self._open(self._next)
            self.apart[self._next] = 0
            self._next += 1

    def _open(self, bucket: int) -> bool:
        """Give it a buffer, if it may have one; whether it has."""
        if not self._is_open[bucket]:
            before = (number for number in range(self._next, bucket) if not self._is_open[number])
            if bucket == self._next:  # one that travels is waited for, if need be
                self._idle = max(0, self._idle - 1)
                self._is_open[bucket] = True
            elif len(list(islice(before, self._idle))) < self._idle:
                self._idle -= 1
                self._is_open[bucket] = True
        return self._is_open[bucket]
