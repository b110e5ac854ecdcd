"""Which ranks share a host: those under one kernel that see each other's processes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import pytest
import torch.distributed as dist
from transports import hosts
from worker_pool import RunOnRanks

from zeroopt.collectives import ControlGroup
from zeroopt.collectives.hosts import host_identity, ranks_by_host

CLONE_NEWPID = 0x20000000  # from sched.h


def group_by_host(of_rank: Sequence[int]) -> list[list[int]]:
    with hosts(of_rank):
        return ranks_by_host(ControlGroup(dist.group.WORLD))


@pytest.mark.parametrize(
    ("of_rank", "expected"),
    [
        ([0, 0, 0, 0], [[0, 1, 2, 3]]),
        ([0, 0, 1, 1], [[0, 1], [2, 3]]),
        ([1, 0, 1, 0], [[0, 2], [1, 3]]),  # in the order of each host's first rank
        ([3, 2, 1, 0], [[0], [1], [2], [3]]),
        ([0, 1, 1, 1], [[0], [1, 2, 3]]),
    ],
)
def test_ranks_by_host(run_on_ranks: RunOnRanks, of_rank: list[int], expected: list[list[int]]) -> None:
    assert run_on_ranks(4, group_by_host, of_rank) == [expected] * 4


def identity_in_subgroups() -> tuple[str, list[list[int]]]:
    groups = [dist.new_group([0, 1]), dist.new_group([1, 2])]
    mine = groups[0] if dist.get_rank() == 0 else groups[1]
    if dist.get_rank() == 1:
        ranks_by_host(ControlGroup(groups[0]))
    return host_identity(), ranks_by_host(ControlGroup(mine))


def test_processes_of_one_machine(run_on_ranks: RunOnRanks) -> None:
    """Ranks are those of the group, whatever they are called in the default group."""
    answers = run_on_ranks(3, identity_in_subgroups)
    assert answers == [(host_identity(), [[0, 1]])] * 3


def identity_in_a_new_pid_namespace() -> str | None:
    """What a process there says; None where there may be none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        if ctypes.CDLL(None).unshare(CLONE_NEWPID) == 0:
            grandchild = os.fork()  # the first process of the namespace
            if grandchild == 0:
                os.write(writer, host_identity().encode())
                os._exit(0)
            os.waitpid(grandchild, 0)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        return answer.read() or None


def test_a_pid_namespace_is_another_host(run_on_ranks: RunOnRanks) -> None:
    (identity,) = run_on_ranks(1, identity_in_a_new_pid_namespace)
    if identity is None:
        pytest.skip("PID namespaces need root")
    boot, _, namespace = host_identity().partition(" ")
    assert identity.startswith(f"{boot} pid:[")
    assert namespace not in identity
