"""Process groups whose ranks wait only shortly for one another, once all of them are there.

torch has one timeout for connecting and for collectives. A test of a rank that does not come wants a short one for collectives; but on a
busy machine, a rank may come to connect many seconds after the others. So groups are made with torch's own timeout, models wrapped and
common steps taken, and only then patience is lost.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


def lose_patience(seconds: float) -> None:
    """Let collectives and messages time out after so many seconds, in all process groups of this rank but the default one, those that
    zeroopt has made included. Collective over all ranks of the default group: nobody connects any more.
    """
    dist.barrier()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
