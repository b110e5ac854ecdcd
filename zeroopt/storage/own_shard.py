"""What one step works on: the own range of one bucket."""

from __future__ import annotations

import torch
from torch import Tensor

from .bucket import Bucket
from .gradient_store import GradientStore
from .segment import Segment


class OwnShard:
    """Parameters, gradient and master of a bucket's own range on one device, their home, where its optimizer's state is, too.

        the bucket's device     parameters ◀──── publish ────┐          sum of gradients
                                                             │                 │ fetch
        home                               master, parameters ◀──── step ──── gradient

    Where home is the bucket's device, both rows are the same memory, and nothing is moved.

    Attributes:
        bucket: of which this is the own range.
        master: parameters and what completes them, at home.
        device: home.
    """

    def __init__(self, bucket: Bucket, store: GradientStore) -> None:
        self.bucket = bucket
        self.master = bucket.master
        self.device = bucket.master.home
        self._store = store
        self._is_away = bucket.master.is_away
        self._fetched: Tensor | None = None

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of the sum of gradients."""
        return self._store.reduced.dtype

    @property
    def grad(self) -> Tensor:
        """[own range], the sum of gradients at home, as it was when it was fetched; always the same memory."""
        if not self._is_away:
            return self._store.reduced
        if self._fetched is None:
            self._fetched = self._store.allocate_sum(self.grad_dtype, self.device)
        return self._fetched

    @property
    def factor(self) -> Tensor | None:
        """0-dim, wherever it lies, by which the sum has yet to be multiplied; None: by nothing. Shards may have one in common."""
        return self._store.factor

    def fetch(self) -> None:
        """Bring the sum of gradients home, before a step that reads `grad`."""
        if self._is_away:
            self.grad.copy_(self._store.reduced)

    def grad_of(self, segment: Segment) -> Tensor:
        """The sum of a segment's gradients, multiplied by all factors, as an optimizer's own step takes it: in the shape and the
        dtype of its shard, at home. Not to be changed."""
        part = self._store.part_as(segment, segment.shard.dtype)
        return part.to(self.device) if self._is_away else part

    def publish(self) -> None:
        """After a step: let the bucket have the new parameters."""
        if self._is_away:
            self.master.publish()
