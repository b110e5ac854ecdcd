"""A further process group of the same ranks, for another thread: collectives of two threads in one group would mix."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch.distributed as dist

from .control import ControlGroup
from .descriptors import warn_of_few_descriptors
from .group_names import level_names
from .group_timeout import group_timeout
from .lost import note_connected, note_second

_BACKEND = "zeroopt_gloo"  # Gloo that connects ranks when they first tell each other something


def second_group(group: dist.ProcessGroup, what: str) -> dist.ProcessGroup:
    """One for small things on the CPU, with the timeout of the first. Collective.

    Gloo by itself connects each rank with each, which ten thousand ranks have no descriptors for. Here all are connected with
    rank 0 alone. They are connected at once, so that a rank that dies later is noticed.

    Args:
        what: is going on, for messages.
    """
    ranks = dist.get_process_group_ranks(group)
    if group.rank() == 0:
        warn_of_few_descriptors(len(ranks) - 1, what)
    timeout = group_timeout(group, ControlGroup(group).device)
    backend = _BACKEND if _connects_late() else "gloo"
    level_names(group, "gloo")
    made: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)
    note_second(made, group)
    if backend == _BACKEND:
        note_connected(made, range(len(ranks)) if group.rank() == 0 else [0])
    ControlGroup(made).collect(None, 0, what)
    return made


@cache
def _connects_late() -> bool:
    """Whether torch can leave connections for later; before 2.8 it cannot."""
    try:
        return bool(_late_devices())
    except TypeError:
        return False


def _late_devices() -> list[Any]:
    """Of Gloo, for the interfaces that it takes by itself."""
    gloo: Any = dist.ProcessGroupGloo
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if names:
        return [gloo.create_device(interface=name, lazy_init=True) for name in names]
    return [gloo.create_default_device(lazy_init=True)]


def _make(given: Any, _: Any) -> Any:
    """What torch calls for a group of the backend."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = given.timeout
    options._devices = _late_devices()
    return gloo(given.store, given.group_rank, given.group_size, options)


if dist.is_gloo_available():
    dist.Backend.register_backend(_BACKEND, _make, extended_api=True, devices=["cpu"])
