"""Full buffers from when they start to travel until no rank reads them any more."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from ..collectives import PendingCollective, Transport
from ..feature import Features
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..storage.buffer_pool import BufferPool
from ..storage.gradient_store import GradientStore


class InFlight:
    """Buckets in the order of their start, which is the same on all ranks.

        start ──▶ travelling ──▶ summed ──▶ lent: other ranks may still read the full buffer ──▶ back in the pool
                                    └─ stage 0: gathered, for every rank steps all of it

    A bucket that travels in stripes is here once for each.

    Attributes:
        most: buckets that travel while another one fills.

    Args:
        pool: from which full buffers are borrowed; None where each bucket has its own.
    """

    def __init__(self, transport: Transport, features: Features, pool: BufferPool | None) -> None:
        self.most = 0
        self._transport = transport
        self._reduced = features.calls["bucket_reduced"]
        self._pool = pool
        self._travelling: deque[tuple[Bucket, GradientStore]] = deque()
        self._lent: deque[GradientStore] = deque()
        self._gathers: list[tuple[str, PendingCollective]] = []  # and how messages call their buckets

    def __len__(self) -> int:
        return len(self._travelling)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to wait for."""
        return not self._travelling and not self._gathers

    def start(self, bucket: Bucket, store: GradientStore) -> None:
        """Let a full bucket travel. Collective."""
        with named_range("reduce_scatter", store.label):
            store.start_reduce(self._transport)
        self._travelling.append((bucket, store))
        if self._is_gathered_unseen(store):
            self.finish_sums()

    def make_way(self) -> None:
        """Before one more starts: have no more than `most` travel."""
        while self._travelling and len(self._travelling) >= self.most:
            self.finish_oldest()

    def finish_oldest(self) -> None:
        """Wait for the sum of the bucket, or stripe, that was started first."""
        bucket, store = self._travelling[0]
        with named_range("wait_for_reduce", store.label):
            # When it fails, it is still the oldest.
            store.finish_next(wait=not self._is_gathered_unseen(store))
        self._travelling.popleft()
        if store.holds_sum:
            for reduced in self._reduced:
                reduced(bucket, store)
        if store.sum_is_spread:  # an all-reduce is a reduce-scatter and an all-gather
            assert store.full is not None
            with named_range("all_gather", store.label):
                self._gathers.append((store.label, self._transport.start_all_gather(store.full, label=store.label)))
        if self._pool is not None:
            self._lent.append(store)

    def _is_gathered_unseen(self, store: GradientStore) -> bool:
        """Whether nobody looks at the sum before its gather, which comes behind it by itself: the current stream goes on."""
        return store.sum_is_spread and self._transport.is_queued and not self._reduced

    def finish_sums(self) -> None:
        """Wait for the sums of all buckets."""
        while self._travelling:
            self.finish_oldest()

    def finish(self) -> None:
        """Wait for all buckets."""
        self.finish_sums()
        self._transport.flush()
        for label, gather in self._gathers:
            with named_range("wait_for_gather", label):
                gather.finish()
        self._gathers.clear()

    def open(self, store: GradientStore) -> Tensor:
        """The full buffer of a bucket or of its next stripe, free or lent to itself, to be filled."""
        while store.stripe.is_first and store in self._lent:  # of the backward before; opening reclaims it
            self._lent.remove(store)
        return store.open()

    def free_buffer(self) -> None:
        """Wait until a full buffer is back in the pool."""
        assert self._pool is not None
        while not self._pool.idle:
            if not self._lent:
                self.finish_oldest()
            store = self._lent.popleft()
            with named_range("wait_until_read", store.label):
                store.reclaim_next()

    def forget_lent(self) -> None:
        """Those that are lent have been reclaimed."""
        self._lent.clear()
