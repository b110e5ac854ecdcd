"""Process groups of some ranks of a process group, made by those alone."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .control import ControlGroup
from .failure import name_ranks, named_failures
from .group_timeout import group_timeout
from .site import Site

# Communicators take memory of the device: models that are wrapped one after the other share them.
_known: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[tuple[int, ...], torch.device], dist.ProcessGroup]] = (
    WeakKeyDictionary()
)


def subgroup(site: Site, ranks: Sequence[int]) -> dist.ProcessGroup:
    """The group of some ranks of a site's group, with its timeout and backend. Collective: every rank of the site's group makes one, and
    of those with which it shares it.

    Args:
        ranks: this one among them, in the order of their numbers.

    Raises:
        CollectiveError: one of them did not do its part.
    """
    made = _known.setdefault(site.group, {})
    key = (tuple(ranks), site.device)
    if key not in made:
        _level_names(site)
        with named_failures(f"making a process group of {name_ranks(list(ranks))}", None):
            made[key] = dist.new_group(
                [dist.get_global_rank(site.group, rank) for rank in ranks],
                timeout=group_timeout(site.group, site.device),
                backend=site.backend,
                use_local_synchronization=True,  # of the job's other ranks, nobody need take part
            )
    return made[key]


def _level_names(site: Site) -> None:
    """torch names a group that only its own ranks make by how many groups a rank is in: where that differs, they would wait for each
    other under different names. So who is in fewer makes some of its own. Collective over the site's group."""
    mine = len(dist.distributed_c10d._world.pg_names)
    everyone = ControlGroup(site.group).numbers([mine], "counting process groups")
    for _ in range(max(count for (count,) in everyone) - mine):
        dist.new_group([dist.get_rank()], backend=site.backend, use_local_synchronization=True)
