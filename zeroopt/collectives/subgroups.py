"""Process groups of some ranks of a process group, made by those alone."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .failure import name_ranks
from .group_names import level_names
from .group_timeout import group_timeout
from .lost import named_failures, note_part
from .site import Site

# Communicators take memory of the device: models that are wrapped one after the other share them.
_known: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[tuple[int, ...], torch.device], dist.ProcessGroup]] = (
    WeakKeyDictionary()
)


def subgroup(site: Site, ranks: Sequence[int], *, shared: bool = True) -> dist.ProcessGroup:
    """The group of some ranks of a site's group, with its timeout and backend. Collective: every rank of the site's group makes one, and
    of those with which it shares it.

    Args:
        ranks: this one among them, in the order of their numbers.
        shared: it may be one that was made before, in which others start collectives, too: from the same thread.

    Raises:
        CollectiveError: one of them did not do its part.
    """
    level_names(site.group, site.backend)
    if not shared:
        return _make(site, ranks)
    made = _known.setdefault(site.group, {})
    key = (tuple(ranks), site.device)
    if key not in made:
        made[key] = _make(site, ranks)
    return made[key]


def _make(site: Site, ranks: Sequence[int]) -> dist.ProcessGroup:
    with named_failures(f"making a process group of {name_ranks(list(ranks))}", None, group=site.group):
        made: dist.ProcessGroup = dist.new_group(
            [dist.get_global_rank(site.group, rank) for rank in ranks],
            timeout=group_timeout(site.group, site.device),
            backend=site.backend,
            use_local_synchronization=True,  # of the job's other ranks, nobody need take part
        )
    note_part(made, site.group, ranks)
    return made
