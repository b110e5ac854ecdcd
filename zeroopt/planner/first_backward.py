"""Gradients that wait in the first backward, in which buckets are in an order that was only guessed."""

from __future__ import annotations

from itertools import islice

from .activations import Activations
from .rehearsal import Rehearsal


def waiting_gradients(rehearsal: Rehearsal, activations: Activations, num_buffers: int) -> list[int]:
    """Bytes of gradients that have come and lie in no buffer, for each of the peaks of a pass.

    A bucket takes a buffer of the pool when it is its turn, and before only where buckets before it need none. It is the
    rule of `GradientReducer._open`. Where every bucket has a buffer of its own, none waits.
    """
    stores, buckets = rehearsal.stores, rehearsal.buckets
    if not stores[0].borrows:
        return [0] * len(activations.peaks)
    bucket_of = {managed.name: bucket.index for bucket in buckets for managed in bucket.params}
    missing = [len(bucket.params) for bucket in buckets]
    is_open = [False] * len(buckets)
    local = [0] * len(buckets)
    idle, in_flight, following = num_buffers, 0, 0
    waiting = [0]
    for name, num_bytes in zip(activations.order, activations.gradients, strict=True):
        if name in bucket_of:
            bucket = bucket_of[name]
            if not is_open[bucket]:
                if bucket == following and idle == 0:
                    idle, in_flight = 1, in_flight - 1
                before = (number for number in range(following, bucket) if not is_open[number])
                if bucket == following or len(list(islice(before, idle))) < idle:
                    idle, is_open[bucket] = idle - 1, True
            if not is_open[bucket]:
                local[bucket] += num_bytes
            missing[bucket] -= 1
            while following < len(buckets) and missing[following] == 0:
                if not is_open[following]:
                    idle, in_flight = (idle - 1, in_flight) if idle else (0, in_flight - 1)
                local[following] = 0
                in_flight, following = in_flight + 1, following + 1
        waiting.append(sum(local))
    return waiting
