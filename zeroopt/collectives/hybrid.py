"""Several hosts with as many ranks each: shared memory within a host, messages between hosts.

Of N = H hosts x L ranks, local rank l of host h owns slice l * H + h of every bucket (among many hosts, whose messages go in rounds,
hosts share a block in another order):

    bucket          |  local rank 0's block   |  local rank 1's block   |      (L = 2)
    slices          | host 0 | host 1 | host 2 | host 0 | host 1 | host 2 |     (H = 3)

reduce-scatter   Each rank sums its local rank's block over the ranks of its host, then the ranks with the same local rank
                 exchange the block's slices between hosts and sum again.
all-gather       The other way round: slices between hosts, then blocks within the host. The host's other ranks depend on what a rank
                 receives, whatever its own thread does meanwhile: a `Driver` waits for it and hands it on.

Where the wire says so (`Wire.between_hosts`), a host's sum is encoded before it goes to others.

So (H-1)/H of a bucket leaves each host once, whatever the number of its ranks. Where L is a power of two, the sums are, bit
for bit, those of a single host: `ops.reduce` adds in a binary tree over ranks, of which a host's ranks are a branch.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Transport
from .driver import Driven, Driver
from .pairwise import StagingPool
from .pending import PendingCollective
from .shared_memory import SharedMemoryError
from .shm import PendingRead, ShmTransport
from .site import Site
from .tree import messages_among
from .wire import PLAIN, Wire


class HybridTransport(Transport):
    """Two transports, one in the other.

    Args:
        hosts: the group's ranks by host, as many on each.

    Raises:
        SharedMemoryError: on all ranks, when one of them cannot share memory with its peers.
    """

    name = "hybrid"
    shares_parameters = True
    needs_gloo_on_cpu = True
    sums_twice = True

    def __init__(self, group: dist.ProcessGroup, hosts: Sequence[Sequence[int]]) -> None:
        super().__init__(group)
        self._hosts = hosts
        host = next(i for i, ranks in enumerate(hosts) if self.control.rank in ranks)
        self._local = ShmTransport(group, hosts[host])
        # With a board of its own, on which the driver posts while the rank posts on the other: each has one order.
        self._local_gathers = ShmTransport(group, hosts[host])
        self._driver = Driver("zeroopt gathers between hosts", stops=True)
        same_local_rank = [ranks[self._local.slice_index] for ranks in hosts]
        # Two of them, for messages are numbered in the order of their start, and ranks may start the reduce of one bucket
        # before or after the gather of another.
        messages = messages_among(len(hosts))
        self._between_hosts = messages(group, same_local_rank)
        self._gathers_between_hosts = messages(group, same_local_rank)
        self.slice_index = self._local.slice_index * len(hosts) + self._between_hosts.slice_index
        self.writers = [ranks[0] for ranks in hosts]
        self._blocks = StagingPool()
        self._reduces: deque[_HybridReduce] = deque()  # those that have not gone beyond this host

    @classmethod
    def serves(cls, site: Site) -> bool:
        return super().serves(site) and 1 < len(site.hosts) < site.group.size()

    @classmethod
    def connect(cls, site: Site) -> Transport:
        sizes = [len(ranks) for ranks in site.hosts]
        if min(sizes) != max(sizes):
            raise SharedMemoryError(f"hosts have different numbers of ranks, {sizes}")
        return cls(site.group, site.hosts)

    @classmethod
    def hops_among(cls, num_slices: int, num_hosts: int) -> int:
        return messages_among(num_hosts).hops_among(num_hosts, num_hosts)

    @property
    def hops(self) -> int:
        return self._between_hosts.hops

    @classmethod
    def staging_bytes(cls, num_bytes: int, item_bytes: int, num_slices: int, num_hosts: int) -> int:
        block = num_bytes // (num_slices // num_hosts)
        return block + messages_among(num_hosts).staging_bytes(block, item_bytes, num_hosts, num_hosts)

    @property
    def sums_in_tree(self) -> bool:
        return [rank for ranks in self._hosts for rank in ranks] == list(range(self.control.size))

    @property
    def sent_bytes(self) -> int:
        return self._between_hosts.sent_bytes + self._gathers_between_hosts.sent_bytes

    @sent_bytes.setter
    def sent_bytes(self, value: int) -> None:
        assert value == 0, "the base class's constructor sets it"

    @property
    def sent_slices(self) -> range:
        first = self._local.slice_index * len(self._hosts)
        return range(first, first + len(self._hosts))

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> Tensor:
        buffer = self._local.allocate(numel, dtype, device, shared=shared)
        self._local_gathers.take_up(buffer, self._local)
        return buffer

    def free(self, buffer: Tensor) -> None:
        self._local_gathers.free(buffer)
        self._local.free(buffer)

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        num_bytes = full.nbytes // self._local.num_slices
        block = self._blocks.take(num_bytes)
        summed = block[:num_bytes].view(full.dtype)
        within_host = self._local.start_reduce_scatter(full, summed, wire=wire, label=label)
        between_hosts, num_hosts, blocks = self._between_hosts, len(self._hosts), self._blocks

        def start_between_hosts() -> PendingCollective:
            onward = wire.between_hosts
            encoded = summed if onward is None else onward.encode(summed, num_hosts)
            return between_hosts.start_reduce_scatter(encoded, out, base, wire=onward or wire, label=label)

        pending = _HybridReduce(self, within_host, start_between_hosts, lambda: blocks.give_back(block))
        self._reduces.append(pending)
        return pending

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        with self.failing_together():
            between_hosts = self._gathers_between_hosts.start_all_gather(self._local.own_slice(full), label=label)
        pending = _HybridGather(self, between_hosts, lambda: self._local_gathers.start_all_gather(full, label=label))
        pending.passing_on = self._driver.start(Driven(pending.pass_on))
        return pending

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        by_rank = super().gather_scalar(value, label=label)
        # The ranks with local rank 0, as they share its block, then those with local rank 1, and so on.
        by_local_rank = zip(*self._between_hosts.in_order_of_slices(self._hosts), strict=True)
        return by_rank[[rank for ranks in by_local_rank for rank in ranks]]

    def start_rendezvous(self, label: str) -> PendingCollective:
        return self._local.start_rendezvous(label)

    def progress(self) -> None:
        self._local.progress()
        while self._reduces and self._reduces[0].is_summed_within_host:
            self._start_first()

    def start_through(self, pending: _HybridReduce) -> None:
        """Take all reduces up to this one beyond the host, in their order."""
        while not pending.is_between_hosts:
            self._start_first()

    def _start_first(self) -> None:
        self._reduces[0].go_between_hosts()  # when it fails, it is still the first
        self._reduces.popleft()

    def give_up(self, reason: str) -> None:
        self._local.give_up(reason)
        self._local_gathers.give_up(reason)
        self._between_hosts.give_up(reason)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Where something fails within the host or between hosts, all ranks hear of it that depend on what should come."""
        try:
            yield
        except RuntimeError:
            self.give_up("a message failed")
            raise


class _HybridReduce(PendingCollective):
    """First within the host, then between hosts."""

    def __init__(
        self,
        transport: HybridTransport,
        within_host: PendingRead,
        start_between_hosts: Callable[[], PendingCollective],
        give_back: Callable[[], None],
    ) -> None:
        self._transport: HybridTransport = weakref.proxy(transport)  # which has this
        self._within_host = within_host
        self._start_between_hosts = start_between_hosts
        self._give_back: Callable[[], None] | None = give_back
        self._between_hosts: PendingCollective | None = None

    @property
    def is_summed_within_host(self) -> bool:
        return self._within_host.is_read

    @property
    def is_between_hosts(self) -> bool:
        return self._between_hosts is not None

    def go_between_hosts(self) -> None:
        with self._transport.failing_together():
            self._within_host.finish()  # messages take the sum from the block: it has to be complete before they start
            self._between_hosts = self._start_between_hosts()

    def finish(self) -> None:
        self._transport.start_through(self)
        assert self._between_hosts is not None
        with self._transport.failing_together():
            self._between_hosts.finish()
            # The block that is given back may be written at once, while other hosts have yet to receive what it holds.
            self._between_hosts.wait_until_read()
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def wait_until_read(self) -> None:
        self._within_host.wait_until_read()


class _HybridGather(PendingCollective):
    """First between hosts, then within the host. The driver starts the second part when the first has arrived.

    Attributes:
        passing_on: what the driver does.
    """

    passing_on: Driven

    def __init__(
        self,
        transport: HybridTransport,
        between_hosts: PendingCollective,
        start_within_host: Callable[[], PendingCollective],
    ) -> None:
        self._transport = transport
        self._between_hosts = between_hosts
        self._start_within_host = start_within_host
        self._within_host: PendingCollective | None = None

    def pass_on(self) -> None:
        """Wait for the messages of other hosts and hand them to this host's ranks. On the driver's thread."""
        with self._transport.failing_together():
            self._between_hosts.finish()  # what has not arrived cannot be shown to this host's ranks
        self._within_host = self._start_within_host()

    def finish(self) -> None:
        self.passing_on.finish()
        assert self._within_host is not None
        with self._transport.failing_together():
            self._within_host.finish()
