"""Where the gradients of a bucket lie: while backward fills them in, while they travel, and after their reduce.

stage 0   one full buffer a bucket, for good; after the all-reduce `param.grad` is a view of it
stage 1   one full buffer a bucket, for good; the own slice of it holds the sum after the reduce-scatter
stage 2   a full buffer borrowed from a pool until the reduce-scatter is done; the sum goes to a buffer of one slice
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bucket import Bucket
from .config import Placement


class BufferPool:
    """Full gradient buffers that buckets of stage 2 borrow.

    It holds as many buffers as were ever borrowed at once: two, for one bucket travels while the next fills, unless gradients
    arrive in another order than the buckets are planned for.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def borrow(self, bucket: Bucket) -> Tensor:
        """A buffer of the bucket's size and dtype, zero wherever no parameter lies."""
        num_bytes = bucket.padded_numel * bucket.dtype.itemsize
        fitting = [i for i, raw in enumerate(self._free) if raw.numel() >= num_bytes and raw.device == bucket.device]
        if fitting:
            raw = self._free.pop(fitting[0])
        else:
            if self._free:  # make room: the one taken now serves smaller buckets too
                self._free.pop()
            raw = torch.empty(num_bytes, dtype=torch.uint8, device=bucket.device)
        full = raw[:num_bytes].view(bucket.dtype)
        bucket.zero_gaps(full)
        return full

    def give_back(self, full: Tensor) -> None:
        self._free.append(torch.empty(0, dtype=torch.uint8, device=full.device).set_(full.untyped_storage()))


class GradientStore:
    """The gradients of one bucket on this rank.

    Attributes:
        full: [padded_numel] while backward fills it; None when stage 2 has handed it back.
        reduced: [own range], the sum over ranks, valid while `holds_sum`.
        base: sum of the earlier backward passes of this step, to which the next reduce adds; None for the first.
    """

    def __init__(self, bucket: Bucket, placement: Placement, pool: BufferPool) -> None:
        self._bucket = bucket
        self._pool = pool
        self._shard_gradient = placement.shard_gradient
        self._shard_state = placement.shard_state
        self.holds_sum = False
        self.base: Tensor | None = None
        self.full: Tensor | None = None
        self.reduced: Tensor
        if placement.shard_gradient:
            self.reduced = torch.zeros_like(bucket.own_param)
        else:
            self.full = torch.zeros_like(bucket.flat_param)
            self.reduced = bucket.within_own_range(self.full)
        self._open = False

    def open(self) -> Tensor:
        """The full buffer for the gradients of one backward pass. What was summed before is kept aside as `base`."""
        if self._open:
            assert self.full is not None
            return self.full
        self._open = True
        if self._shard_gradient:
            self.full = self._pool.borrow(self._bucket)
            self.base = self.reduced if self.holds_sum else None
        elif self._shard_state:
            self.base = self.reduced.clone() if self.holds_sum else None
        # Stage 0 has no base: autograd itself adds to param.grad, which is a view of the full buffer.
        assert self.full is not None
        return self.full

    def close(self) -> None:
        """The reduce is done: `reduced` holds the sum, and a borrowed buffer goes back."""
        if self._shard_gradient:
            assert self.full is not None
            self._pool.give_back(self.full)
            self.full = None
        self.base = None
        self.holds_sum = True
        self._open = False

    def discard(self) -> None:
        """Forget the sum; the next backward starts a new one."""
        self.holds_sum = False
