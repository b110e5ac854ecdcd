"""What every transport offers: the collectives that ZeRO needs, on flat buckets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..pages import paged_zeros
from ..weak_methods import weak_method
from .control import ControlGroup
from .exchange import Exchange, MessageExchange
from .pending import Done, PendingCollective
from .site import Site
from .wire import PLAIN, Wire


class Transport(ABC):
    """Moves flat buckets between the ranks of one process group.

    Every method that starts something, `allocate` and `barrier` are collective: all ranks of the group make the same calls,
    on buffers of the same size, in the same order. Reduces may be finished in any order, gathers after `flush` too, except
    that between hosts all ranks have to finish them in the same order. `label` names the bucket in messages, and is
    the same on all ranks: where it differs, they have diverged.

    On a device with streams, whatever is started comes behind what the current stream has been told so far. To finish it is to let the
    current stream, and that on which it was started, come behind it; another stream may finish it once more. The host need not wait.

    Attributes:
        control: who this rank is in the group, and what the ranks tell each other besides buckets.
        num_slices: of every bucket.
        slice_index: which of them this rank owns.
        replica: where several ranks own one slice, the how-manyeth of them this one is.
        needs_staging: every reduce-scatter on its way takes memory of its own, up to the size of its bucket, so that few may be.
        is_queued: what is started comes behind the result of what was started before, though nobody has finished that.
        shares_parameters: whether `allocate(shared=True)` is possible.
        sums_twice: some ranks' sums travel on to be summed with others; only for wires that nest.
        is_local: its ranks share memory, and nothing goes over a network.
        needs_gloo_on_cpu: it works on buckets in CPU memory, and on groups of the Gloo backend.
        writers: ranks of the group that write parameters for all ranks that share them; the first is rank 0.
        sent_bytes: what this rank has sent of buckets over the network, by the transport's own count.
        exchange: brings pieces of buckets from rank to rank, once `open_exchange` has been called.
        exchanged_bytes: what this rank has sent by it, over the network or not.
    """

    name: str
    needs_staging = True
    is_queued = False
    shares_parameters = False
    needs_gloo_on_cpu = False
    sums_twice = False
    is_local = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.control: ControlGroup = ControlGroup(group)
        self.slice_index: int = self.control.rank
        self.num_slices: int = self.control.size
        self.replica = 0
        self.writers: Sequence[int] = range(self.control.size)
        self.sent_bytes = 0
        self.exchanged_bytes: int = 0
        self._exchange: Exchange | None = None

    @property
    def exchange(self) -> Exchange:
        assert self._exchange is not None, "open_exchange() comes first"
        return self._exchange

    def open_exchange(self) -> None:
        """Make `exchange`, if there is none. Collective."""
        if self._exchange is None:
            self._exchange = self.make_exchange()

    def make_exchange(self) -> Exchange:
        """What brings pieces of this transport's buckets from rank to rank. Collective."""
        return MessageExchange(self.control, self.slice_index, self.ranks_by_slice(), weak_method(self.count_exchanged))

    def ranks_by_slice(self) -> list[int]:
        """The ranks of the group that own the slices; where several own each, one of them for this rank to deal with, which deals
        with this one for its slice. Collective."""
        slices = [index for (index,) in self.control.numbers([self.slice_index], "telling who owns which slice")]
        place = slices[: self.control.rank].count(self.slice_index)
        owners: list[list[int]] = [[] for _ in range(self.num_slices)]
        for rank, index in enumerate(slices):
            owners[index].append(rank)
        return [ranks[place] for ranks in owners]

    def count_exchanged(self, num_bytes: int) -> None:
        """So many bytes have been sent by the exchange."""
        self.exchanged_bytes += num_bytes

    @classmethod
    def serves(cls, site: Site) -> bool:
        """Whether the transport is made for such a group. Collective as far as `site` is."""
        return site.has_gloo_on_cpu or not cls.needs_gloo_on_cpu

    @classmethod
    def connect(cls, site: Site) -> Transport:
        """The transport of a group. Collective.

        Raises:
            SharedMemoryError: on all ranks, which would have to share memory and cannot.
        """
        return cls(site.group)

    @classmethod
    def staging_bytes(cls, num_bytes: int, item_bytes: int, num_slices: int, num_hosts: int) -> int:
        """Memory that a reduce-scatter of a plain bucket takes beside the bucket while it travels, in bytes.

        Args:
            num_bytes, item_bytes: of the bucket, and of an element of it.
            num_hosts: on which the ranks of the slices are, as many on each.
        """
        return 0

    @classmethod
    def hops_among(cls, num_slices: int, num_hosts: int) -> int:
        """How many messages the reduce-scatter of a bucket costs a rank one after the other, whatever the size of the bucket.

        Args:
            num_hosts: as for `staging_bytes`.
        """
        return num_slices - 1

    @property
    def hops(self) -> int:
        """Those of this transport."""
        return self.hops_among(self.num_slices, self.num_slices)

    @property
    def sums_in_tree(self) -> bool:
        """Whether float32 sums are those of `ops.reduce` over all ranks of the group, in their order, where their number is a power of
        two."""
        return True

    @property
    def writes_parameters(self) -> bool:
        """Whether this rank is one of the `writers`."""
        return self.control.rank in self.writers

    @property
    def sent_slices(self) -> range:
        """The slices of a bucket that this rank sends over a network or to others, of its own gradients or of its host's sum."""
        return range(0 if self.is_local else self.num_slices)

    def own_slice(self, full: Tensor) -> Tensor:
        """This rank's slice of a bucket, a view."""
        return slice_of(full, self.slice_index, self.num_slices)

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> Tensor:
        """Zeros, 1-D, in memory that the transport can work on; the collectives take these buffers and views from their
        first element on, and nothing else.

        Args:
            shared: the ranks of one host get the same memory. Only where `shares_parameters` is true.
        """
        assert not shared or self.shares_parameters
        return paged_zeros(numel, dtype, device)

    def free(self, buffer: Tensor) -> None:
        """Forget a buffer from `allocate` that no collective uses any more; its memory goes with its last reference. Not
        collective, but all ranks free the same buffers."""

    @abstractmethod
    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        """Start `out = base + sum over ranks of this rank's slice of full`, as `wire.combine` does it.

        Args:
            full: 1-D, `num_slices` equally long slices, encoded by the wire. It must not change until it has been read.
            out: 1-D, for a plain sum as long as a slice; of the same dtype (then it may be the own slice of `full`), or
                float32 for slices of 16 bits.
            base: None, or a tensor like `out`. It may be `out`.
            wire: only between hosts does it make a difference whether it nests.
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
        return self.control.start_largest(out, f"transport {self.name}, max of {label}")

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        """The 0-dim tensors of all ranks, float32 or float64: [world_size], by the slice that a rank owns, and before that by
        replica."""
        return self.control.gather(value, f"transport {self.name}, gather of {label}")

    def progress(self) -> None:
        """Do what can be done for started collectives without waiting for anyone."""

    def flush(self) -> None:
        """Return when the other ranks need nothing more of this one for the all-gathers that it has started."""

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.control.barrier(f"transport {self.name}, barrier")

    def give_up(self, reason: str) -> None:
        """Tell the other ranks, as far as the transport can, that this one will not do its part. Not collective."""


def slice_of(full: Tensor, index: int, num_slices: int) -> Tensor:
    """Slice `index` of the `num_slices` slices of a bucket, a view."""
    numel = full.numel() // num_slices
    return full.narrow(0, index * numel, numel)
