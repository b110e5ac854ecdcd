"""Memory that the ranks of one host share.

It is anonymous (memfd_create), so it has no name that anyone could guess or that could be left behind, whatever ends a
process, and the size of /dev/shm does not limit it. A peer opens it through /proc, which the kernel allows to processes of
the same user (and to root) in the same PID namespace. Once all have mapped it, the descriptors are closed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from .._C import SharedMapping
from ..errors import CollectiveError
from .control import ControlGroup

_WHAT = "sharing memory"  # for messages


class SharedMemoryError(CollectiveError):
    """Raised on every rank of a group when one of them could not share memory; says which one, and why."""


class OpenMemory:
    """Anonymous memory of this process that peers may open by its `address`.

    Attributes:
        fd: its descriptor.
    """

    def __init__(self, num_bytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("shared memory without a name (memfd_create) exists on Linux only")
        self.fd = os.memfd_create("zeroopt", os.MFD_CLOEXEC)
        try:
            os.fchmod(self.fd, 0o600)
            os.ftruncate(self.fd, num_bytes)
        except OSError:
            os.close(self.fd)
            raise

    @property
    def address(self) -> list[int]:
        """Where a peer finds it, and the device and inode by which it knows that it found the right one."""
        status = os.fstat(self.fd)
        return [os.getpid(), self.fd, status.st_dev, status.st_ino]


def open_peer_memory(address: Sequence[int]) -> int:
    """A descriptor of the memory that another process has put at an address."""
    pid, fd, device, inode = address
    path = f"/proc/{pid}/fd/{fd}"
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    status = os.fstat(opened)
    if (status.st_dev, status.st_ino) != (device, inode):
        os.close(opened)
        raise OSError(f"{path} is another file than the one that rank has shared")
    return opened


def map_together(
    control: ControlGroup, members: Sequence[int], num_bytes: int, *, one_for_all: bool = False
) -> tuple[list[memoryview], int]:
    """Map zeroed memory of every member, or of the first member alone, into all members. Where nobody has written yet, it takes
    addresses only.

    Collective over the whole group; each rank names the members of its own host.

    Returns:
        [num_bytes] by member (all the same with `one_for_all`), and an open descriptor of the first member's.

    Raises:
        SharedMemoryError: it failed on some rank of the group.
    """
    owners = members[:1] if one_for_all else members
    mine: OpenMemory | None = None
    mapped: list[memoryview] = []
    problem: str | None = None
    with ExitStack() as until_all_have_mapped, ExitStack() as where_it_fails:
        try:
            if control.rank in owners:
                mine = OpenMemory(num_bytes)
                until_all_have_mapped.callback(os.close, mine.fd)
        except OSError as error:
            problem = f"rank {control.rank} cannot make shared memory: {error}"
        addresses = control.numbers([0, 0, 0, 0] if mine is None else mine.address, _WHAT)
        first = -1
        try:
            if all(addresses[owner][0] for owner in owners):  # else the one without memory says why
                for owner in owners:
                    is_mine = mine is not None and owner == control.rank
                    descriptor = os.dup(mine.fd) if mine and is_mine else open_peer_memory(addresses[owner])
                    with ExitStack() as until_mapped:
                        (where_it_fails if first < 0 else until_mapped).callback(os.close, descriptor)
                        mapped.append(memoryview(SharedMapping(descriptor, num_bytes)))
                    first = descriptor if first < 0 else first
        except (OSError, RuntimeError) as error:
            problem = f"rank {control.rank} cannot map the memory of rank {owner}: {error}"
        reason = first_problem(control, problem)
        if reason is not None:
            raise SharedMemoryError(reason)
        where_it_fails.pop_all()
    return (mapped * len(members) if one_for_all else mapped), first


def first_problem(control: ControlGroup, problem: str | None) -> str | None:
    """The problem of the first rank that has one, on all ranks. Collective."""
    rank = control.first(problem is not None, _WHAT)
    return None if rank is None else control.tell(problem, rank, _WHAT)
