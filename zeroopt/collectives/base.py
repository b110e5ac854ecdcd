"""What every transport offers: the collectives that ZeRO needs, on flat buckets."""

from __future__ import annotations

import atexit
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CollectiveError
from .failure import describe_failure, is_timeout, the_other_rank


class PendingCollective(ABC):
    """A collective that has been started."""

    @abstractmethod
    def finish(self) -> None:
        """Block until the result is there. Calling it again does nothing.

        Raises:
            CollectiveError: a rank did not do its part: it died, gave up, or the group's timeout went by.
        """

    def wait_until_read(self) -> None:
        """After `finish`: block until this rank's input may be overwritten, for no other rank still reads it.

        Raises:
            CollectiveError: as `finish`.
        """


class Done(PendingCollective):
    """A collective that had nothing to wait for."""

    def finish(self) -> None:
        pass


class PendingWork(PendingCollective):
    """What torch.distributed has been told to do.

    Args:
        what: transport and collective, for messages.
        works: by the rank that it needs; None: by all.
        keep: tensors that it reads or writes.
    """

    # Gloo breaks the connection of a message that is freed before it has arrived, and with it the process group. So what
    # nobody finishes, because a model was dropped, stays here.
    _unfinished: ClassVar[set[PendingWork]] = set()

    def __init__(self, what: str, works: Sequence[tuple[int | None, dist.Work]], keep: Collection[object]) -> None:
        self._what = what
        self._works = deque(works)
        self._keep = keep
        self._failure: str | None = None
        self._unfinished.add(self)

    def finish(self) -> None:
        if self._failure is not None:
            raise CollectiveError(self._failure)
        while self._works:
            rank, work = self._works[0]
            try:
                work.wait()
            except RuntimeError as error:
                # The backend's own message says whether it was a timeout or a lost connection.
                self._failure = self._give_up_rest(rank, str(error))
                raise CollectiveError(self._failure) from error
            self._works.popleft()
        self._unfinished.discard(self)
        self._keep = ()

    def wait_at_exit(self, deadline: float) -> None:
        """Wait for what is still on its way, unless it is in vain."""
        with suppress(RuntimeError):
            for _, work in self._works if self._failure is None else ():
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))

    def abandon(self) -> None:
        """Break the connections over which something has yet to come."""
        for _, work in self._works:
            with suppress(RuntimeError):
                work.wait(_AT_ONCE)

    def _give_up_rest(self, rank: int | None, reason: str) -> str:
        """Give up the messages that have not come by now. That breaks their connections, so that the ranks at the other ends
        fail at once too, rather than wait for this one."""
        missing = [rank]
        for other, work in list(self._works)[1:]:
            try:
                work.wait(_AT_ONCE)
            except RuntimeError as error:
                # Who is merely not there yet is to blame only when the time has gone by for all.
                if is_timeout(reason) or not is_timeout(str(error)):
                    missing.append(other)
        return describe_failure(self._what, missing, reason)


_AT_ONCE = timedelta(milliseconds=1)
_AT_EXIT = timedelta(seconds=10)


@atexit.register
def _finish_at_exit() -> None:
    """A rank that is through may be ahead of the others, who have yet to receive what it has sent."""
    deadline = time.monotonic() + _AT_EXIT.total_seconds()
    for pending in list(PendingWork._unfinished):
        pending.wait_at_exit(deadline)


class Transport(ABC):
    """Moves flat buckets between the ranks of one process group.

    Every method that starts something, `allocate` and `barrier` are collective: all ranks of the group make the same calls,
    on buffers of the same size, in the same order. Reduces may be finished in any order, gathers after `flush` too, except
    that between hosts all ranks have to finish them in the same order. `label` names the bucket in messages, and is
    the same on all ranks: where it differs, they have diverged.

    Attributes:
        group: the process group.
        rank, world_size: this process within the group.
        slice_index: which slice of every bucket this rank owns, a permutation of the ranks.
        needs_staging: a reduce-scatter on its way takes memory of its own, up to the size of its bucket.
        shares_parameters: whether `allocate(shared=True)` is possible.
        writers: ranks of the group that write parameters for all ranks that share them; the first is rank 0.
        sent_bytes: what this rank has sent of buckets over the network, by the transport's own count.
    """

    name: str
    needs_staging = True
    shares_parameters = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.world_size = group.size()
        self.slice_index = self.rank
        self.writers: Sequence[int] = range(self.world_size)
        self.sent_bytes = 0

    @property
    def writes_parameters(self) -> bool:
        """Whether this rank is one of the `writers`."""
        return self.group.rank() in self.writers

    def own_slice(self, full: Tensor) -> Tensor:
        """This rank's slice of a bucket, a view."""
        return slice_of(full, self.slice_index, self.world_size)

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> Tensor:
        """Zeros, 1-D, in memory that the transport can work on; the collectives take these buffers and views from their
        first element on, and nothing else.

        Args:
            shared: the ranks of one host get the same memory. Only where `shares_parameters` is true.
        """
        assert not shared or self.shares_parameters
        if device.type != "cpu":
            return torch.zeros(numel, dtype=dtype, device=device)
        # Pages of their own, which take memory only when they are first used; torch.zeros writes them.
        pages = mmap(-1, max(1, numel) * dtype.itemsize, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=dtype)[:numel]

    def free(self, buffer: Tensor) -> None:
        """Forget a buffer from `allocate` that no collective uses any more; its memory goes with its last reference. Not
        collective, but all ranks free the same buffers."""

    @abstractmethod
    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, label: str = "a bucket"
    ) -> PendingCollective:
        """Start `out = base + sum over ranks of this rank's slice of full`.

        Args:
            full: 1-D, `world_size` equally long slices. It must not change until it has been read.
            out: 1-D, as long as a slice; of the same dtype (then it may be the own slice of `full`), or float32 for slices
                of 16 bits.
            base: None, or a tensor like `out`. It may be `out`.
        """

    @abstractmethod
    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        """Start filling the slices of `full` that other ranks own from those ranks, in place.

        No rank may still use those slices: see `start_rendezvous`. Once every rank has started it and called `flush`, it
        comes to its end whatever the other ranks do meanwhile. Until this rank has finished it, it must not write its own
        slice.
        """

    def start_rendezvous(self, label: str) -> PendingCollective:
        """Start waiting until all ranks have come here too, where others write into this rank's buffers (`start_all_gather`).
        Until it is finished, nobody has."""
        return Done()

    def start_max(self, flags: Tensor, out: Tensor, *, label: str = "flags") -> PendingCollective:
        """Start `out = max over ranks of flags`, element by element. uint8, 1-D; `flags` comes from `allocate` and must not
        change until it has been read."""
        out.copy_(flags)
        work = dist.all_reduce(out, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return PendingWork(f"transport {self.name}, max of {label}", [(the_other_rank(self.group), work)], (out,))

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        """The 0-dim tensors of all ranks, float32 or float64: [world_size], by the slice that a rank owns."""
        return gather_scalar(value, self.group, f"transport {self.name}, gather of {label}")

    def progress(self) -> None:
        """Do what can be done for started collectives without waiting for anyone."""

    def flush(self) -> None:
        """Return when the other ranks need nothing more of this one for the all-gathers that it has started."""

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        dist.barrier(group=self.group)

    def give_up(self, reason: str) -> None:
        """Tell the other ranks, as far as the transport can, that this one will not do its part. Not collective."""


def gather_scalar(value: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """The 0-dim tensors of all ranks of a group: [its size]. Collective; `what` is for messages.

    Raises:
        CollectiveError: a rank did not do its part.
    """
    values = [torch.empty_like(value) for _ in range(group.size())]
    work = dist.all_gather(values, value, group=group, async_op=True)
    PendingWork(what, [(the_other_rank(group), work)], (value, values)).finish()
    return torch.stack(values)


def slice_of(full: Tensor, index: int, num_slices: int) -> Tensor:
    """Slice `index` of the `num_slices` slices of a bucket, a view."""
    numel = full.numel() // num_slices
    return full.narrow(0, index * numel, numel)
