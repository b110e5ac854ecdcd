"""The full gradient buffers that buckets of stage 2 borrow while backward fills them and while they travel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import Transport
from ..options.config import Config
from .bucket import Bucket


class BufferPool:
    """Some buffers in which any bucket fits, and never more.

    Attributes:
        idle: those that nobody has borrowed.
    """

    def __init__(self, config: Config, transport: Transport) -> None:
        self._config = config
        self._transport = transport
        self._num_bytes = 0
        self.idle: list[Tensor] = []
        self._by_address: dict[int, Tensor] = {}

    def fit(self, buckets: Sequence[Bucket]) -> None:
        """Make buffers in which each of these buckets fits. Collective. None may be lent."""
        num_bytes = bytes_of_buffer(self._config, buckets)
        if num_bytes > self._num_bytes:
            self.free()
            self._num_bytes = num_bytes
            device, count = buckets[0].device, num_buffers(self._config)
            self.idle = [self._transport.allocate(num_bytes, torch.uint8, device) for _ in range(count)]
            self._by_address = {raw.data_ptr(): raw for raw in self.idle}

    def borrow(self, bucket: Bucket, dtype: torch.dtype) -> Tensor:
        """A buffer of the bucket's size, zero wherever no parameter lies."""
        full = self.idle.pop(0)[: bucket.padded_numel * dtype.itemsize].view(dtype)
        bucket.zero_gaps(full)
        return full

    def give_back(self, full: Tensor) -> None:
        # At the front: of buffers that are used in turn, more would be resident.
        self.idle.insert(0, self._by_address[full.data_ptr()])

    def free(self) -> None:
        """Give up all buffers. Those that are lent belong to reduces that this rank has finished."""
        for raw in self._by_address.values():
            self._transport.free(raw)
        self._num_bytes = 0
        self._by_address.clear()
        self.idle.clear()


def num_buffers(config: Config) -> int:
    """How many buffers there are: where nothing overlaps, the next bucket is filled when the one before has travelled."""
    return config.bucket_buffers if config.overlap else 1


def bytes_of_buffer(config: Config, buckets: Sequence[Bucket]) -> int:
    """The size of a buffer in which the gradients of each of these buckets can travel."""
    return max((bucket.padded_numel * (config.wire_dtype or bucket.dtype).itemsize for bucket in buckets), default=0)
