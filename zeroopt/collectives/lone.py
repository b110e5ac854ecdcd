"""A process that trains by itself, without `init_process_group`: what stands for its process group."""

from __future__ import annotations

import os
from functools import cache

import torch.distributed as dist

from ..errors import StateError


@cache
def lone_group() -> dist.ProcessGroup:
    """A group of this process alone. It has a rank and a size, and no backend: nothing may be sent in it, and
    torch.distributed does not know it."""
    return dist.ProcessGroup(0, 1)  # type: ignore[call-arg]


def is_lone(group: dist.ProcessGroup) -> bool:
    """Whether a group is the one without a backend."""
    return group is lone_group()


def default_group() -> dist.ProcessGroup:
    """The default process group, or the one of this process alone where none has been made and only one process was started.

    Raises:
        StateError: there are other processes, and no process group.
    """
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise StateError(
            f"this process is one of {os.environ['WORLD_SIZE']} (by WORLD_SIZE in its environment) and has no process group: call "
            "torch.distributed.init_process_group first"
        )
    return lone_group()
