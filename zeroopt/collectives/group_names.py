"""What torch calls process groups that only their own ranks make."""

from __future__ import annotations

import torch.distributed as dist

from .control import ControlGroup


def level_names(group: dist.ProcessGroup, backend: str) -> None:
    """torch names a group that only its own ranks make (`use_local_synchronization`) by how many groups a rank is in: where that differs,
    they would wait for each other under different names. So who is in fewer makes some of its own. Collective.

    Args:
        backend: of these.
    """
    mine = len(dist.distributed_c10d._world.pg_names)
    everyone = ControlGroup(group).numbers([mine], "counting process groups")
    for _ in range(max(count for (count,) in everyone) - mine):
        dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)
