"""Numbers of what is made over one process group: the same on all of its ranks, which make these things in one order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch.distributed as dist

# By the group itself, for names come again: after `destroy_process_group` torch counts from 0, and the group that had a name
# before had other ranks, who have counted otherwise.
_made: WeakKeyDictionary[dist.ProcessGroup, Counter[Hashable]] = WeakKeyDictionary()


def next_number(group: dist.ProcessGroup, kind: Hashable) -> int:
    """How many of a kind have been made over this group before."""
    made = _made.setdefault(group, Counter())
    made[kind] += 1
    return made[kind] - 1
