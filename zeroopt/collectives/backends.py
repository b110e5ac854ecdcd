"""Which backends a process group has, and for which devices."""

from __future__ import annotations

import torch.distributed as dist

from .lone import is_lone


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """The backends of a group by the device type that each serves, for example {"cpu": "gloo", "cuda": "nccl"}; none where this
    process is alone. Not collective."""
    if is_lone(group):
        return {}
    config = str(dist.get_backend_config(group))  # for example "cpu:gloo,cuda:nccl"
    entries = (entry.partition(":") for entry in config.split(","))
    return {device: backend for device, _, backend in entries if backend}
