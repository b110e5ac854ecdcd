"""State that is cut among the ranks of a group, a node for one, and held by every such group: `wrap(shard_group=)`.

                       shard_group      shard_group
                       ┌────────┐       ┌────────┐
    own slice 0        │ rank 0 │ ───── │ rank 2 │      the same state, from the same gradients
    own slice 1        │ rank 1 │ ───── │ rank 3 │
                       └────────┘       └────────┘

    reduce-scatter   within the shard group, then an all-reduce of the own slice across: of a bucket, 2/S of its bytes times (R-1)/R
                     leave a rank for others of the R groups of S
    all-gather       within the shard group alone

Both go by whatever transport serves the ranks in question. Where these sum here and shard groups of a power of two follow one another
in the process group, the bits are those of one flat group: `ops.reduce` adds in a tree of which a shard group is a branch. In buckets of
16 bits a group's sum is rounded before it goes across.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from .base import Transport
from .comm_stream import CommStream, StreamCollective
from .control import ControlGroup
from .exchange import Exchange
from .lost import note_part
from .pairwise import StagingPool
from .pending import Done, PendingCollective
from .select import TransportFactory, connect_transport
from .site import Site
from .subgroups import subgroup
from .tree import messages_among
from .wire import PLAIN, Wire


class ReplicatedTransport(Transport):
    """One transport within a shard group, and one across the groups.

    Args:
        within: of the shard group; its slices are those of this one.
        across: of the ranks that own the same slice in all shard groups, in the order of the groups.
        owners: the group's ranks by shard group and slice.
    """

    name = "replicated"
    sums_twice = True

    def __init__(self, site: Site, within: Transport, across: Transport, owners: Sequence[Sequence[int]]) -> None:
        super().__init__(site.group)
        self.within, self.across = within, across
        self.slice_index, self.num_slices = within.slice_index, within.num_slices
        self.replica = next(i for i, ranks in enumerate(owners) if self.control.rank in ranks)
        self._owners = owners
        # On the device, where an index that is made anew for each number would have the host wait.
        self._in_order = torch.tensor([rank for ranks in owners for rank in ranks], device=site.device)
        self._stream = CommStream(site.device, blocks_host=site.blocks_host)
        self._queues = not site.blocks_host
        self.needs_staging = site.blocks_host
        self._pool = StagingPool()
        self._reduces: deque[_Reduce] = deque()  # those that have not gone across yet

    @property
    def sums_in_tree(self) -> bool:
        follow = [rank for ranks in self._owners for rank in sorted(ranks)] == list(range(self.control.size))
        return follow and self.within.sums_in_tree and self.across.sums_in_tree

    @property
    def sent_bytes(self) -> int:
        return self.within.sent_bytes + self.across.sent_bytes

    @sent_bytes.setter
    def sent_bytes(self, value: int) -> None:
        assert value == 0, "the base class's constructor sets it"

    def make_exchange(self) -> Exchange:
        return self.within.make_exchange()

    @property
    def hops(self) -> int:
        return self.within.hops + 2 * self.across.hops

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> Tensor:
        return self.within.allocate(numel, dtype, device)

    def free(self, buffer: Tensor) -> None:
        self.within.free(buffer)

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        reduce = _Reduce(self, full, out, base, wire, label)
        if self._queues:

            def queue() -> None:
                reduce.start()
                reduce.go_across()

            return self._in_turn(queue, full, out, base)
        reduce.start()
        self._reduces.append(reduce)
        return reduce

    def _in_turn(self, queue: Callable[[], None], *tensors: Tensor | None) -> PendingCollective:
        """Queue something on this transport's stream, behind what has been queued there: the communicators of a device take turns, in one
        order on all ranks. At once, each of two may hold what the other needs to begin, on another rank."""
        self._stream.fall_in(*tensors)
        return StreamCollective(self._stream, Done, queue)

    def take_across(self, reduce: _Reduce) -> None:
        """Take all reduces up to this one across, in the order of their start, which is that of all ranks."""
        while not reduce.is_over:
            try:
                self._reduces[0].go_across()  # when it fails, it is still the first
            except RuntimeError:
                self.give_up(
                    "a collective failed"
                )  # so that those hear of it at once that wait for this rank on the other side
                raise
            self._reduces.popleft()

    def slice_across(self, slice_numel: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the own slice, padded so that it can be cut among the groups; and from which it came."""
        numel = -(-slice_numel // self.across.num_slices) * self.across.num_slices
        if not like.is_cpu:
            memory = torch.empty(numel * like.itemsize, dtype=torch.uint8, device=like.device)
        else:
            memory = self._pool.take(numel * like.itemsize)
        padded = memory[: numel * like.itemsize].view(like.dtype)
        padded[slice_numel:].zero_()
        return padded, memory

    def give_back(self, memory: Tensor) -> None:
        """Of a slice that has been across."""
        if memory.is_cpu:
            self._pool.give_back(memory)

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        start = partial(self.within.start_all_gather, full, label=label)
        return self._in_turn(lambda: start().finish(), full) if self._queues else start()

    def start_max(self, flags: Tensor, out: Tensor, *, label: str = "flags") -> PendingCollective:
        start = partial(super().start_max, flags, out, label=label)
        return self._in_turn(lambda: start().finish(), flags, out) if self._queues else start()

    def start_rendezvous(self, label: str) -> PendingCollective:
        return self.within.start_rendezvous(label)

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        by_rank = super().gather_scalar(value, label=label)
        return by_rank[self._in_order]

    def progress(self) -> None:
        self.within.progress()

    def flush(self) -> None:
        self.within.flush()

    def give_up(self, reason: str) -> None:
        self.within.give_up(reason)
        self.across.give_up(reason)


class _Reduce(PendingCollective):
    """Within the shard group, then across."""

    def __init__(
        self, transport: ReplicatedTransport, full: Tensor, out: Tensor, base: Tensor | None, wire: Wire, label: str
    ) -> None:
        self._transport: ReplicatedTransport = weakref.proxy(transport)  # which has this
        self._full, self._out, self._base, self._wire, self._label = full, out, base, wire, label
        self.is_over = False

    def start(self) -> None:
        transport, full = self._transport, self._full
        numel = full.numel() // transport.num_slices
        self._padded, self._memory = transport.slice_across(numel, full)
        self._summed = self._padded[:numel]
        self._within = transport.within.start_reduce_scatter(full, self._summed, wire=self._wire, label=self._label)

    def go_across(self) -> None:
        """Returns when the sum over all ranks is there, or, on a device, the current stream comes behind it."""
        across, padded = self._transport.across, self._padded
        self._within.finish()
        own = across.own_slice(padded)
        reduce = across.start_reduce_scatter(padded, own, wire=self._wire, label=self._label)
        if not across.is_queued:
            reduce.finish()
            reduce.wait_until_read()
        across.start_rendezvous(self._label).finish()
        gather = across.start_all_gather(padded, label=self._label)
        across.flush()
        gather.finish()
        self._wire.combine([self._summed], self._out, self._base)
        self.is_over = True
        self._transport.give_back(self._memory)

    def finish(self) -> None:
        self._transport.take_across(self)

    def wait_until_read(self) -> None:
        self._within.wait_until_read()


def connect_replicated(
    choice: str | TransportFactory,
    group: dist.ProcessGroup,
    shard_group: dist.ProcessGroup,
    device: torch.device,
) -> Transport:
    """A transport of a process group whose ranks share their state within shard groups. Collective over the process group.

    Args:
        choice: of the transport within shard groups.

    Raises:
        ConfigError: on all ranks: shard groups are not alike, or do not hold each rank once.
    """
    site = Site(group, device)
    shards = _shard_groups(ControlGroup(group), shard_group)
    note_part(shard_group, group, next(ranks for ranks in shards if group.rank() in ranks))
    within = connect_transport(choice, shard_group, device)
    slices = ControlGroup(group).numbers([within.slice_index], "comparing shard groups")
    owners = [sorted(ranks, key=lambda rank: slices[rank][0]) for ranks in shards]
    partners = [ranks[within.slice_index] for ranks in owners]
    across = _connect_across(subgroup(site, partners), device)
    return ReplicatedTransport(site, within, across, owners)


def _connect_across(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """On the CPU by messages: ranks that own the same slice are on different hosts, and slices lie in memory of this rank's own."""
    site = Site(group, device)
    if group.size() > 1 and site.has_gloo_on_cpu:
        return messages_among(group.size()).connect(site)
    return connect_transport("auto", group, device)


def _shard_groups(control: ControlGroup, shard_group: dist.ProcessGroup) -> list[list[int]]:
    """The ranks of each, by their place in it; in the order of their first ranks."""
    rank_of = {dist.get_global_rank(control.group, rank): rank for rank in range(control.size)}
    mine = [rank_of.get(rank, -1) for rank in dist.get_process_group_ranks(shard_group)]
    facts = [min(mine), mine[0], shard_group.rank(), len(mine)]
    by_first: dict[int, dict[int, int]] = {}
    sizes = set()
    everyone = control.numbers(facts, "comparing shard groups")
    for rank, (lowest, first, place, size) in enumerate(everyone):
        if lowest < 0:
            raise ConfigError(
                f"expected shard_group to be part of process_group, which holds all ranks that train together; that of rank {rank} "
                "has others"
            )
        by_first.setdefault(first, {})[place] = rank
        sizes.add(size)
    if len(sizes) > 1 or any(sorted(ranks) != list(range(*sizes)) for ranks in by_first.values()):
        raise ConfigError(
            "expected every rank of process_group to be in one shard_group, all of the same size; got groups of "
            f"{', '.join(str(size) for size in sorted(sizes))} ranks that begin with ranks {', '.join(map(str, sorted(by_first)))}"
        )
    return [[rank for _, rank in sorted(ranks.items())] for _, ranks in sorted(by_first.items())]
