"""What every transport offers: the two collectives that ZeRO needs, on one flat bucket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Protocol

from torch import Tensor


class PendingCollective(Protocol):
    """A collective that has been started."""

    def finish(self) -> None:
        """Block until the result is there and the buffers belong to the caller again. Call it once."""


# Collectives that nobody will finish. Gloo breaks the connection of a message that is freed before it has arrived, and with
# it the process group, so what was started must outlive the model that it was started for.
_abandoned: list[object] = []


def abandon(*pending: Collection[object]) -> None:
    """Keep started collectives, and the buffers that they use, for as long as the process lives."""
    _abandoned.extend(collection for collection in pending if collection)


class Transport(ABC):
    """Moves flat buckets between the ranks of one process group.

    Every call is collective: all ranks of the group start the same collectives on buckets of the same size in the same
    order. They may be finished in any order.

    Attributes:
        rank, world_size: this process within the group.
        sent_bytes: what this rank has sent of slices of buckets, by the transport's own count.
    """

    name: str

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.sent_bytes = 0

    def own_slice(self, full: Tensor) -> Tensor:
        """This rank's slice of a bucket, a view."""
        return slice_of(full, self.rank, self.world_size)

    @abstractmethod
    def start_reduce_scatter(self, full: Tensor, out: Tensor, base: Tensor | None = None) -> PendingCollective:
        """Start `out = base + sum over ranks of this rank's slice of full`.

        Args:
            full: 1-D, `world_size` equally long slices. It must not change until the collective is finished.
            out: 1-D, as long as a slice and of its dtype. It may be the own slice of `full`.
            base: None, or a tensor like `out`. It may be `out`.
        """

    @abstractmethod
    def start_all_gather(self, full: Tensor) -> PendingCollective:
        """Start filling the slices of `full` that other ranks own from those ranks, in place."""


def slice_of(full: Tensor, rank: int, world_size: int) -> Tensor:
    """Slice `rank` of the `world_size` slices of a bucket, a view."""
    numel = full.numel() // world_size
    return full.narrow(0, rank * numel, numel)
