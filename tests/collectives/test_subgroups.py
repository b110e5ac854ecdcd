"""Groups of some ranks: made by those alone, once, with the timeout of the group that they belong to."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from transports import CPU
from worker_pool import RunOnRanks

from zeroopt.collectives.group_timeout import group_timeout
from zeroopt.collectives.site import Site
from zeroopt.collectives.subgroups import subgroup


def make_some() -> tuple[list[int], bool, float, bool]:
    """The ranks of this one's group, whether it is made once, its timeout, and whether another group has one of its own. Rank 3 has no
    part in any of it."""
    if dist.get_rank() == 3:
        dist.new_group([0, 1, 2], timeout=timedelta(seconds=77))
        return [], True, 0.0, True
    group = dist.new_group([0, 1, 2], timeout=timedelta(seconds=77))
    ranks = [1] if dist.get_rank() == 1 else [0, 2]
    if dist.get_rank() == 2:  # which is in more groups than the others
        dist.new_group([2], use_local_synchronization=True)
    made, again = (subgroup(Site(group, CPU), ranks) for _ in range(2))
    other = subgroup(Site(dist.new_group([0, 1, 2], use_local_synchronization=True), CPU), ranks)
    timeout = group_timeout(made, CPU).total_seconds()
    return dist.get_process_group_ranks(made), made is again, timeout, other is not made


def test_groups_are_made_by_their_ranks(run_on_ranks: RunOnRanks) -> None:
    answers = run_on_ranks(4, make_some)
    for rank, (members, once, timeout, apart) in enumerate(answers[:3]):
        assert members == ([1] if rank == 1 else [0, 2])
        assert (once, timeout, apart) == (True, 77.0, True)
