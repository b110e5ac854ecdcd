"""For tests of transports: one by its name, hosts that a test makes up, what a transport has to come to, what it leaves."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from mmap import PAGESIZE
from pathlib import Path
from unittest.mock import patch

import reference
import torch
import torch.distributed as dist
from torch import Tensor

from zeroopt.collectives import Transport
from zeroopt.collectives.base import slice_of
from zeroopt.collectives.select import connect_transport

CPU = torch.device("cpu")
MEMORY = "/memfd:zeroopt"  # what /proc calls zeroopt's shared memory

# Everything that `connect_transport` can choose on the CPU, with the numbers of ranks that it is tested with.
TRANSPORTS = [
    ("single", 1),
    *((name, world_size) for name in ("pairwise", "tree", "shm", "torch", "all_to_all") for world_size in (2, 3, 4)),
    ("hybrid", 4),
    ("hierarchy", 4),
]


def connect(name: str) -> Transport:
    """Collective. Those of several hosts have the first half of the ranks on one, and the second half on another."""
    if name in ("hybrid", "hierarchy"):
        world_size = dist.get_world_size()
        with hosts([2 * rank // world_size for rank in range(world_size)]):
            transport = connect_transport("auto" if name == "hybrid" else name, dist.group.WORLD, CPU)
    else:
        transport = connect_transport("auto" if name == "single" else name, dist.group.WORLD, CPU)
    assert transport.name == name
    return transport


@contextmanager
def hosts(of_rank: Sequence[int]) -> Iterator[None]:
    """Within it, ranks of the default group are on the hosts with these numbers."""
    with patch("zeroopt.collectives.hosts.host_identity", lambda: f"host {of_rank[dist.get_rank()]}"):
        yield


def open_memory() -> list[int]:
    """Inodes of the shared memory of which this process holds a descriptor."""
    inodes = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # listdir's own, which is closed by now
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(MEMORY):
                inodes.append(os.stat(f"/proc/self/fd/{descriptor}").st_ino)
    return inodes


def mapped_memory(pid: int | str = "self") -> set[int]:
    """Inodes of the shared memory that a process has mapped; none of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {int(line.split()[4]) for line in lines if MEMORY in line}


def resident_pages(address: int, num_bytes: int) -> int:
    """Pages that this process has mapped at an address, which is that of one, of memory that may be gone by now."""
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(address // PAGESIZE * 8)
        entries = torch.frombuffer(bytearray(pages.read(-(-num_bytes // PAGESIZE) * 8)), dtype=torch.int64)
    return int((entries < 0).sum())  # the highest bit: it is there


def resident_shared_pages() -> int:
    """Pages of all shared memory that this process has mapped."""
    total, is_shared = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # the head of what is said of one mapping
            is_shared = MEMORY in line
        elif first == "Rss:" and is_shared:
            total += int(rest[0]) * 1024 // PAGESIZE
    return total


class LogLines(logging.Handler):
    """What zeroopt logs on this rank within a `with`.

    Attributes:
        lines: one message each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("zeroopt").addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("zeroopt").removeHandler(self)


def values(rank: int, numel: int, dtype: torch.dtype, number: int = 0) -> Tensor:
    """What a rank has in its bucket for collective `number`; any rank can tell."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * number + rank)).to(dtype)


def sum_of_slices(buckets: Sequence[Tensor], index: int, dtype: torch.dtype, base: Tensor | None = None) -> Tensor:
    """What the owner of slice `index` has after a reduce-scatter of all ranks' buckets."""
    return reference.reduce([slice_of(bucket, index, len(buckets)) for bucket in buckets], dtype, base)
