"""What the two halves of an all-reduce of a bucket take, by transport. A new transport is a function, and an entry in `COSTS`.

A half is a row of phases. Those of a rank's own thread come when that thread asks for the collective; all others by themselves, one after
the other, on what they use. Every rank does the same at the same time, so one of each host's ranks stands for all: its phase in the network
is that of the host.

    N ranks on H hosts of L, buckets of B bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isqrt, log2
from typing import NamedTuple

from ..collectives.tree import goes_in_rounds
from .machine import Machine

CALLER, LOCAL, NETWORK = "caller", "local", "network"


class Phase(NamedTuple):
    """A part of a collective.

    Attributes:
        where: on whose time: the rank's own thread, the links within the host, or the host's link.
        seconds: for which that is taken.
        latency: seconds more until the next phase.
        processor_s: that threads of libraries take meanwhile from what the rank computes.
        alone: whether the next collective waits for the latency, too, as those of one communicator do: messages do not.
    """

    where: str
    seconds: float
    latency: float = 0.0
    processor_s: float = 0.0
    alone: bool = False


@dataclass(frozen=True)
class Halves:
    """Of an all-reduce."""

    reduce_scatter: tuple[Phase, ...] = ()
    all_gather: tuple[Phase, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """Ranks on a machine's hosts."""

    machine: Machine
    world_size: int

    @property
    def host_ranks(self) -> int:
        return min(self.machine.host_ranks, self.world_size)

    @property
    def num_hosts(self) -> int:
        return max(1, self.world_size // self.machine.host_ranks)


Cost = Callable[[Ranks, float], Halves]


def alone(ranks: Ranks, num_bytes: float) -> Halves:
    """Nothing travels."""
    return Halves()


def ring(ranks: Ranks, num_bytes: float) -> Halves:
    """One ring over all ranks, as NCCL's and Gloo's: N-1 hops, of which H leave a host, and (N-1)/N of a bucket over each link."""
    machine, size, hosts = ranks.machine, ranks.world_size, ranks.num_hosts
    if size == 1:
        return Halves()
    moved = num_bytes * (size - 1) / size
    across = hosts if hosts > 1 else 0
    latency = (size - 1) / size * (across * machine.network_latency + (size - across) * machine.local_latency)
    processor = 2 * (moved * machine.byte_s + (size - 1) * machine.message_s)
    sums = (
        3 * moved / machine.memory_bandwidth if machine.byte_s else 0.0
    )  # by a library's thread, not by a device's copy engines
    where, seconds = (
        (NETWORK, moved / min(machine.network_bandwidth, machine.local_bandwidth))
        if across
        else (LOCAL, moved / machine.local_bandwidth)
    )
    return Halves(
        (Phase(where, seconds, latency, processor + sums, alone=True),),
        (Phase(where, seconds, latency, processor, alone=True),),
    )


def levels(sizes: Sequence[int], ranks: Ranks, num_bytes: float) -> Halves:
    """A ring within each host, then rings between the ranks with the same place on `sizes[0]` hosts, on `sizes[1]` groups of hosts, and so on;
    gathers the other way round."""
    machine, within = ranks.machine, ranks.host_ranks
    phases = []
    if within > 1:
        seconds = num_bytes * (within - 1) / within / machine.local_bandwidth
        phases.append(Phase(LOCAL, seconds, (within - 1) * machine.local_latency, alone=True))
    left = num_bytes  # of a host's ranks together
    for size in sizes:
        if size > 1:
            seconds = left * (size - 1) / size / machine.network_bandwidth
            phases.append(Phase(NETWORK, seconds, (size - 1) * machine.network_latency, alone=True))
            left /= size
    return Halves(tuple(phases), tuple(reversed(phases)))


def two_levels(ranks: Ranks, num_bytes: float) -> Halves:
    """Host, then all hosts."""
    return levels([ranks.num_hosts], ranks, num_bytes)


def three_levels(ranks: Ranks, num_bytes: float) -> Halves:
    """Host, then groups of about as many hosts as there are groups."""
    within = next(size for size in range(isqrt(ranks.num_hosts), 0, -1) if ranks.num_hosts % size == 0)
    return levels([within, ranks.num_hosts // within], ranks, num_bytes)


def recursive_halving(ranks: Ranks, num_bytes: float) -> Halves:
    """Within each host a ring, between hosts log2(H) rounds, each with half of what is left."""
    machine = ranks.machine
    local = levels([], ranks, num_bytes).reduce_scatter
    hosts = ranks.num_hosts
    if hosts == 1:
        return Halves(local, local)
    seconds = num_bytes * (hosts - 1) / hosts / machine.network_bandwidth
    between = Phase(NETWORK, seconds, ceil(log2(hosts)) * machine.network_latency, alone=True)
    return Halves((*local, between), (between, *local))


def pairwise(ranks: Ranks, num_bytes: float) -> Halves:
    """N-1 messages: each slice straight to its owner, who sums."""
    return _messages(ranks, num_bytes, ranks.world_size, ranks.host_ranks)


def tree(ranks: Ranks, num_bytes: float) -> Halves:
    """log2(N) rounds, of which those between ranks of a host come first; a thread sums. Large slices go straight to their owners."""
    machine, size, hosts = ranks.machine, ranks.world_size, ranks.num_hosts
    if not goes_in_rounds(ceil(num_bytes), size):
        return pairwise(ranks, num_bytes)
    moved, rounds = num_bytes * (size - 1) / size, ceil(log2(size))
    processor = 2 * (moved * machine.byte_s + rounds * machine.message_s)
    where, latency = (NETWORK, ceil(log2(hosts)) * machine.network_latency) if hosts > 1 else (LOCAL, 0.0)
    seconds = num_bytes * (hosts - 1) / hosts / machine.network_bandwidth
    sums = 3 * moved / machine.memory_bandwidth
    return Halves((Phase(where, seconds, latency, processor + sums),), (Phase(where, seconds, latency, processor),))


def shm(ranks: Ranks, num_bytes: float) -> Halves:
    """A rank reads its slice from all buckets of the host, and writes it into all."""
    machine, size = ranks.machine, ranks.host_ranks
    if size == 1:
        return Halves()
    reads = num_bytes * (1 + 1 / size)
    copies = num_bytes * (size - 1) / size * 2  # read and written
    return Halves(
        (Phase(CALLER, reads / machine.memory_bandwidth),),
        (Phase(CALLER, copies / machine.memory_bandwidth),),
    )


def hybrid(ranks: Ranks, num_bytes: float) -> Halves:
    """Shared memory within a host; between hosts messages of the ranks with the same place, which a thread hands on to the others."""
    within = shm(ranks, num_bytes)
    between = _messages(ranks, num_bytes / ranks.host_ranks, ranks.num_hosts, 1)
    handed_on = tuple(Phase(LOCAL, phase.seconds, 0.0, phase.seconds) for phase in within.all_gather)
    return Halves(within.reduce_scatter + between.reduce_scatter, between.all_gather + handed_on)


def _messages(ranks: Ranks, num_bytes: float, size: int, on_this_host: int) -> Halves:
    """Of each rank of a host to `size - 1` others, of which `on_this_host - 1` are on it."""
    machine = ranks.machine
    if size == 1:
        return Halves()
    moved = num_bytes * (size - 1) / size
    beside = num_bytes * (on_this_host - 1) / size
    away = ranks.host_ranks * (moved - beside)
    processor = 2 * (moved * machine.byte_s + (size - 1) * machine.message_s)
    travels = []
    if beside:
        travels.append(Phase(LOCAL, beside / machine.local_bandwidth, machine.local_latency, processor))
    if away:
        taken = 0.0 if beside else processor
        travels.append(Phase(NETWORK, away / machine.network_bandwidth, machine.network_latency, taken))
    sums = Phase(CALLER, (num_bytes + num_bytes / size) / machine.memory_bandwidth)
    return Halves((*travels, sums), tuple(travels))


COSTS: dict[str, Cost] = {
    "single": alone,
    "shm": shm,
    "pairwise": pairwise,
    "tree": tree,
    "hybrid": hybrid,
    "torch": ring,
    "all_to_all": pairwise,
    "hierarchy": two_levels,
    "ring": ring,
    "two levels": two_levels,
    "three levels": three_levels,
    "recursive halving": recursive_halving,
}
"""By the name of a transport, and what there might be besides."""
