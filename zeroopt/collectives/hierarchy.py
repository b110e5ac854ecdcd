"""Reduces and gathers in levels: within a node, then across nodes, by sub-groups of the process group (`levels`).

    reduce-scatter   on each level, the closest ranks first: an all-to-all of what this rank has so far, and the sum of what has come.
                     What goes on to the next level is one part of it
    all-gather       the other way round, from the last level to the first

Flat collectives of N ranks take N - 1 hops a bucket, which is most of their time when there are many ranks; levels of 8, 32 and 32
take 7 + 31 + 31. Of a bucket, (H-1)/H leaves each of H hosts, as with a ring. So sums can be this library's own, as in `all_to_all`:
in the tree of `ops.reduce` on each level, in float32. Where the sizes of all levels but the last are powers of two and buckets
float32, they are bit for bit those of a single host. Buckets of 16 bits are rounded once more on each further level.

On a device, all levels of a bucket are queued behind one another on the communication stream: the host waits for nothing, and
communicators take turns in one order on all ranks. On the CPU a thread goes from level to level (`driver`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from .base import Transport, slice_of
from .comm_stream import StreamCollective
from .driver import Driven, Driver
from .failure import name_ranks, the_other_rank
from .levels import Levels
from .lost import named_failures
from .pending import Done, PendingCollective, PendingWork
from .renamed import all_gather_flat
from .site import Site
from .subgroups import subgroup
from .torch_native import TorchTransport
from .wire import PLAIN, Wire


class HierarchyTransport(TorchTransport):
    """One level after the other.

    Args:
        levels: of the group's ranks.
    """

    name = "hierarchy"
    sums_here = True
    sums_twice = True  # by a class; one of a single level does not

    def __init__(self, site: Site, levels: Levels) -> None:
        super().__init__(site.group, site.device)
        self.levels = levels
        self.sums_twice = len(levels.sizes) > 1
        self.slice_index = levels.slice_of(self.control.rank)
        # On the device, where an index that is made anew for each number would have the host wait.
        self._rank_of_slice = torch.tensor(sorted(range(self.control.size), key=levels.slice_of), device=site.device)
        members = [levels.members(self.control.rank, level) for level in range(len(levels.sizes))]
        # On the CPU whoever waits is held up; a thread that waits holds up nobody. Each has groups of its own, for Gloo goes by the order
        # in which collectives are started, and threads of two models start theirs in any.
        self._driver = Driver() if site.device.type == "cpu" else None
        self._steps = [_Step(ranks, subgroup(site, ranks, shared=self._driver is None)) for ranks in members]

    @classmethod
    def serves(cls, site: Site) -> bool:
        """For "auto": devices whose backend works on their streams, on hosts for which there are levels."""
        if site.device.type == "cpu" or site.blocks_host:
            return False
        hosts = site.hosts
        return 1 < len(hosts) < site.group.size() and _are_alike(hosts) and _are_in_order(hosts)

    @classmethod
    def connect(cls, site: Site) -> Transport:
        if not _are_alike(site.hosts):
            raise ConfigError(
                f"transport='hierarchy' needs as many ranks on each host, got hosts of {[len(ranks) for ranks in site.hosts]} ranks; "
                "use transport=zeroopt.collectives.hierarchy(...) with sizes of your own, or transport='auto'"
            )
        if not _are_in_order(site.hosts):
            raise ConfigError(
                f"transport='hierarchy' needs hosts whose ranks are in one order, in each host and across hosts, got {site.hosts}; use "
                "transport='auto'"
            )
        _check_waits(site)
        return cls(site, Levels.of_hosts(site.hosts))

    @classmethod
    def hops_among(cls, num_slices: int, num_hosts: int) -> int:
        return num_slices // num_hosts - 1 + num_hosts - 1

    @property
    def hops(self) -> int:
        return sum(size - 1 for size in self.levels.sizes)

    @classmethod
    def staging_bytes(cls, num_bytes: int, item_bytes: int, num_slices: int, num_hosts: int) -> int:
        # What has come in, on each level, and the sum of the first one, which goes on.
        block = num_bytes * num_hosts // num_slices if 1 < num_hosts < num_slices else 0
        return num_bytes + 2 * block

    @property
    def sums_in_tree(self) -> bool:
        return self.levels.ranks == tuple(range(self.control.size))

    @property
    def sent_slices(self) -> range:
        if len(self.levels.sizes) == 1:
            return super().sent_slices
        if len(self.levels.sizes) > 2:
            return range(0)  # codes travel between two levels, not through three
        in_block = self.num_slices // self.levels.sizes[0]
        first = self.levels.part(self.control.rank, 0) * in_block
        return range(first, first + in_block)

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        self._stream.fall_in(full, out, base)
        sizes = self.levels.sizes
        parts = [full.numel() // math.prod(sizes[:level]) for level in range(len(sizes))]  # of what comes in
        memory = self._scratch.take(2 * sum(parts) - full.numel(), full)
        received = torch.split(memory, [parts[0], *(part for part in parts[1:] for _ in range(2))])
        return self._run(partial(self._climb, full, received, out, base, wire, f"reduce-scatter of {label}"))

    def _climb(
        self, mine: Tensor, memory: Sequence[Tensor], out: Tensor, base: Tensor | None, wire: Wire, what: str
    ) -> None:
        """Args:
        memory: for what comes in; on each further level for the sum so far, and for what comes in.
        """
        for level, step in enumerate(self._steps):
            if level == 1 and wire.between_hosts is not None:
                wire = wire.between_hosts
                mine = wire.encode(mine, step.size)
            received = _room_for(mine, memory[2 * level])
            step.wait_for(  # as bytes: not every backend knows all dtypes
                partial(dist.all_to_all_single, received.view(torch.uint8), mine.view(torch.uint8)),
                f"transport {self.name}, {what}",
                (mine, received),
            )
            self.sent_bytes += mine.nbytes // step.size * (step.size - 1)
            slices = received.view(step.size, -1).unbind()
            if level + 1 < len(self._steps):
                mine = memory[2 * level + 1]
                wire.combine(slices, mine, None)
            else:
                wire.combine(slices, out, base)

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        self._stream.fall_in(full)
        return self._run(partial(self._descend, full, f"all-gather of {label}"))

    def _descend(self, full: Tensor, what: str) -> None:
        blocks = [full]  # by level: what its ranks come to have together
        for level, size in enumerate(self.levels.sizes):
            blocks.append(slice_of(blocks[-1], self.levels.part(self.control.rank, level), size))
        for level, step in reversed(list(enumerate(self._steps))):
            block, own = blocks[level], blocks[level + 1]
            step.wait_for(partial(all_gather_flat, block, own), f"transport {self.name}, {what}", (full,))
            self.sent_bytes += own.nbytes * (step.size - 1)

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        by_rank = super().gather_scalar(value, label=label)
        return by_rank[self._rank_of_slice]

    def _run(self, levels: Callable[[], None]) -> PendingCollective:
        if self._driver is None:
            return StreamCollective(self._stream, Done, levels)
        return self._driver.start(Driven(levels))


def _room_for(mine: Tensor, memory: Tensor) -> Tensor:
    """Memory like `mine`: that which is there, or new where it is too small, as it may be for codes of few elements."""
    place = memory.view(torch.uint8)[: mine.nbytes]
    return place.view(mine.dtype) if place.nbytes == mine.nbytes else torch.empty_like(mine)


class _Step:
    """The ranks with which this one exchanges on one level."""

    def __init__(self, members: Sequence[int], group: dist.ProcessGroup) -> None:
        self._members = members
        self._group = group
        self.size = len(members)
        self._missing = the_other_rank(group)

    def wait_for(self, collective: Callable[..., dist.Work], what: str, keep: tuple[Tensor, ...]) -> None:
        """Run it among them, and let the current stream, or the thread, wait for it."""
        what = f"{what} among {name_ranks(self._members)}"
        with named_failures(what, self._missing, group=self._group):
            work = collective(group=self._group, async_op=True)
        PendingWork(what, [(self._missing, work)], keep, group=self._group, on_device=not keep[0].is_cpu).finish()


def hierarchy(*sizes: int) -> Callable[[dist.ProcessGroup, torch.device], Transport]:
    """Levels of one's own: for `wrap(transport=hierarchy(8, 32))`, on any backend.

    Args:
        sizes: how many ranks, or groups of the level before, exchange with each other, neighbours first; a last level takes what is
            left. With 2,048 ranks, `hierarchy(8, 32)` has levels of 8, 32 and 8.

    Raises:
        ConfigError: from the function that it returns: the number of ranks is no multiple of all sizes.
    """
    return partial(_connect_levels, sizes)


def _connect_levels(sizes: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> Transport:
    unit = math.prod(sizes)
    if min(sizes, default=0) < 2 or group.size() % unit:
        raise ConfigError(
            f"expected hierarchy{sizes} to have sizes of 2 or more, whose product divides the number of ranks, {group.size()}"
        )
    _check_waits(Site(group, device))
    rest = (group.size() // unit,) if group.size() > unit else ()
    return HierarchyTransport(Site(group, device), Levels((*sizes, *rest), tuple(range(group.size()))))


def _are_alike(hosts: Sequence[Sequence[int]]) -> bool:
    return len({len(ranks) for ranks in hosts}) == 1


def _are_in_order(hosts: Sequence[Sequence[int]]) -> bool:
    """Whether the ranks of every level are in the order of their numbers, which is that of their places in a process group."""
    places = [*hosts, *zip(*hosts, strict=True)]
    return all(list(ranks) == sorted(ranks) for ranks in places)


def _check_waits(site: Site) -> None:
    """Raise ConfigError where the host waits for what a device has to do: levels would start when somebody waits for them, and not in the
    same order on all ranks."""
    if site.blocks_host and site.device.type != "cpu":
        raise ConfigError(
            f"transport='hierarchy' needs CPU parameters, or a backend that works on a device's streams, got {site.device.type} "
            f"parameters and {site.backend}; use transport='auto'"
        )
