"""A further group of the same ranks: its timeout, its few connections, and that a rank which dies is noticed."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from short_timeouts import lose_patience
from worker_pool import WORKER_DIED, RunOnRanks

from zeroopt import CollectiveError
from zeroopt.collectives import ControlGroup
from zeroopt.collectives.group_timeout import group_timeout
from zeroopt.collectives.second_group import second_group

WHAT = "testing"


def num_sockets() -> int:
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # listdir's own, which is closed by now
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return found


def connect() -> tuple[int, int, float, list[int]]:
    """Sockets that a mesh takes, and that it takes; its timeout in seconds; what ranks hear in it."""
    before = num_sockets()
    mesh = dist.new_group(timeout=timedelta(seconds=77))
    ControlGroup(mesh).barrier(WHAT)
    of_mesh = num_sockets() - before
    made = second_group(mesh, WHAT)
    of_made = num_sockets() - before - of_mesh
    control = ControlGroup(made)
    heard = control.hand_out([rank * 10 for rank in range(control.size)] if control.rank == 0 else None, 0, WHAT)
    seconds = group_timeout(made, control.device).total_seconds()
    return of_mesh, of_made, seconds, [heard, *(control.collect(control.rank, 0, WHAT) or [])]


def test_a_group_for_another_thread(run_on_ranks: RunOnRanks) -> None:
    size = 7
    answers = run_on_ranks(size, connect)
    for rank, (of_mesh, of_made, seconds, heard) in enumerate(answers):
        assert seconds == 77
        assert heard == [10 * rank, *(range(size) if rank == 0 else [])]
        assert of_mesh >= size - 1
        assert rank == 0 or of_made < of_mesh, "it knows its neighbours and rank 0"


def lose_rank_2() -> str:
    """The others hear that rank 2 is gone, rank 1 from rank 0."""
    made = second_group(dist.group.WORLD, WHAT)
    dist.barrier()  # nobody dies while others connect
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(CollectiveError, match="for want of rank 2:"):
        ControlGroup(made).collect("to rank 0", 0, WHAT)
        ControlGroup(made).hand_out(None, 0, WHAT)
    return "heard"


def test_a_rank_that_dies_is_noticed(run_on_ranks: RunOnRanks) -> None:
    """The group's timeout is half an hour."""
    died = (WORKER_DIED, "killed by SIGKILL")
    assert run_on_ranks.outcomes(3, lose_rank_2) == ["heard", "heard", died]


def make_where_one_rank_is_in_more_groups() -> int:
    """Whether numbers come by it, where rank 0 is in a group that rank 1 is not in."""
    dist.new_group([0])
    group = second_group(dist.group.WORLD, "a test")
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total, group=group)
    return int(total)


def test_ranks_may_be_in_different_groups(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, make_where_one_rank_is_in_more_groups) == [3, 3]


def wait_for_who_waits(folder: Path) -> str:
    """Rank 1 does nothing. Rank 0 waits for it in the second group, and then rank 2 for rank 0 in the first one."""
    rank, first = dist.get_rank(), dist.new_group()
    second = second_group(first, "testing")
    lose_patience(2.0)
    failed, named = folder / "failed", folder / "named"
    message = ""
    if rank == 0:
        with pytest.raises(CollectiveError):
            ControlGroup(second).receive(torch.zeros(1), 1, "in the second group")
        failed.touch()
    if rank == 2:
        wait_for(failed)
        with pytest.raises(CollectiveError) as raised:
            ControlGroup(first).receive(torch.zeros(1), 0, "in the first group")
        message = str(raised.value)
        named.touch()
    wait_for(named)
    return message


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_a_rank_that_has_failed_in_the_one_names_in_the_other(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    message = run_on_ranks(3, wait_for_who_waits, tmp_path)[2]
    assert message.startswith("in the first group: failed for want of rank 1: ")
