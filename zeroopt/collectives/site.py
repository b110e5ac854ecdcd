"""Where a transport is to work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .backends import backends_of
from .control import ControlGroup
from .hosts import ranks_by_host


@dataclass(frozen=True)
class Site:
    """A process group, the device of its buckets, and the hosts of its ranks. All ranks ask it for the same things in the same
    order, for some answers come from all of them."""

    group: dist.ProcessGroup
    device: torch.device

    @property
    def has_gloo_on_cpu(self) -> bool:
        """Whether buckets lie in CPU memory and the group sends messages through Gloo. Not collective."""
        return self.device.type == "cpu" and "gloo" in self.backend

    @property
    def backend(self) -> str:
        """Name of the backend that serves the device in this group, for example "gloo". Not collective."""
        return backends_of(self.group).get(self.device.type) or str(dist.get_backend(self.group))

    @property
    def blocks_host(self) -> bool:
        """Whether waiting for the backend holds up the host, rather than a stream of the device alone. Not collective."""
        return self.device.type == "cpu" or self.backend == "gloo"

    @property
    def hosts(self) -> list[list[int]]:
        """The group's ranks, host by host. Collective when it is asked for the first time."""
        known = vars(
            self
        )  # a cached_property, before Python 3.12, would let ranks that are threads wait for each other
        if "_hosts" not in known:
            known["_hosts"] = ranks_by_host(ControlGroup(self.group))
        hosts: list[list[int]] = known["_hosts"]
        return hosts
