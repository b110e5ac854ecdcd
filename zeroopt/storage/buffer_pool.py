"""The full gradient buffers that buckets of stage 2 borrow while backward fills them and while they travel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import Transport
from ..options.config import Config
from ..pages import paged_zeros
from ..streams import Mark
from .bucket import Bucket
from .stripe import Stripe, cut_in_stripes


class BufferPool:
    """Some buffers, never more, of the size of a bucket. Larger buckets travel in stripes.

    Args:
        bucket_bytes: the size of a bucket.

    Attributes:
        idle: those that nobody has borrowed.
    """

    def __init__(self, config: Config, bucket_bytes: int, transport: Transport) -> None:
        self._config = config
        self._bucket_bytes = bucket_bytes
        self._transport = transport
        self._num_bytes = 0
        self._sum_bytes = 0
        self.idle: list[Tensor] = []
        self._by_address: dict[int, Tensor] = {}
        self._given_back: dict[int, Mark] = {}  # by address
        self._scratch: dict[torch.device, Tensor] = {}

    @property
    def lends_sums(self) -> bool:
        """Whether the sum of a bucket lies in memory that the next one's takes, too."""
        return self._config.step_in_backward

    def fit(self, buckets: Sequence[Bucket]) -> None:
        """Make buffers in which each of these buckets, or each of its stripes, fits. Collective. None may be lent."""
        self._sum_bytes = max(map(bytes_of_sum, buckets), default=0)
        num_bytes = bytes_of_buffer(self._config, self._bucket_bytes, buckets, self._transport.num_slices)
        if num_bytes > self._num_bytes:
            self.free()
            self._num_bytes = num_bytes
            device, count = buckets[0].device, num_buffers(self._config)
            self.idle = [self._transport.allocate(num_bytes, torch.uint8, device) for _ in range(count)]
            self._by_address = {raw.data_ptr(): raw for raw in self.idle}

    def stripes(self, bucket: Bucket) -> list[Stripe]:
        """The parts in which a bucket travels: one where it fits into a buffer."""
        return stripes_of(bucket, self._config, self._bucket_bytes, self._transport.num_slices)

    def borrow(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A buffer of this size, with whatever there is in it. The current stream may write it."""
        raw = self.idle.pop(0)
        given_back = self._given_back.pop(raw.data_ptr(), None)
        if given_back is not None:
            given_back.wait()
        return raw[: numel * dtype.itemsize].view(dtype)

    def scratch(self, own: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the sum of one bucket at a time, on the device where it is summed or on that where it is stepped. Where `fit`
        has heard of larger buckets since, those that had some before keep it.

        Args:
            own: [own range], a bucket's parameters.
        """
        raw = self._scratch.get(device)
        if raw is None or raw.numel() < self._sum_bytes:
            raw = self._scratch[device] = paged_zeros(self._sum_bytes, torch.uint8, device)
        return raw[: own.numel() * dtype.itemsize].view(dtype)

    def give_back(self, full: Tensor) -> None:
        """A buffer that the current stream might write."""
        self._given_back[full.data_ptr()] = Mark(full.device)
        # At the front: of buffers that are used in turn, more would be resident.
        self.idle.insert(0, self._by_address[full.data_ptr()])

    def free(self) -> None:
        """Give up all buffers. Those that are lent belong to reduces that this rank has finished."""
        for raw in self._by_address.values():
            self._transport.free(raw)
        self._num_bytes = 0
        self._scratch.clear()
        self._given_back.clear()
        self._by_address.clear()
        self.idle.clear()


def bytes_of_sum(bucket: Bucket) -> int:
    """Of a bucket's own range, summed over slices."""
    return bucket.own_param.numel() * bucket.precision.sum_dtype(bucket.dtype, by_slices=True).itemsize


def num_buffers(config: Config) -> int:
    """How many buffers there are: where nothing overlaps, the next bucket is filled when the one before has travelled."""
    return config.bucket_buffers if config.overlap else 1


def stripes_of(bucket: Bucket, config: Config, bucket_bytes: int, num_slices: int) -> list[Stripe]:
    """The parts in which the gradients of a bucket travel, each at most as large as a bucket that is planned: `bucket_bytes`, and
    what makes its slices equal."""
    unit = num_slices * bucket.precision.slice_alignment(bucket.home)
    wanted = bucket_bytes // (config.wire_dtype or bucket.dtype).itemsize
    return cut_in_stripes(bucket.padded_numel, num_slices, max(1, -(-wanted // unit)) * unit)


def bytes_of_buffer(config: Config, bucket_bytes: int, buckets: Sequence[Bucket], num_slices: int) -> int:
    """The size of a buffer in which the gradients of each of these buckets can travel."""
    return max(
        (
            stripes_of(bucket, config, bucket_bytes, num_slices)[0].numel * (config.wire_dtype or bucket.dtype).itemsize
            for bucket in buckets
        ),
        default=0,
    )
