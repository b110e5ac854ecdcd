"""Picks the transport for a process group and the device that the parameters live on."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .base import Transport
from .control import ControlGroup
from .hosts import ranks_by_host
from .hybrid import HybridTransport
from .lone import is_lone
from .pairwise import PairwiseTransport
from .shared_memory import SharedMemoryError
from .shm import ShmTransport
from .single import SingleTransport
from .torch_native import TorchTransport

_log = logging.getLogger("zeroopt")


def check_transport(name: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ConfigError when the transport cannot serve that backend or device. Not collective."""
    if name in ("pairwise", "shm") and not is_lone(group) and not _is_gloo_on_cpu(group, device):
        raise ConfigError(
            f"transport={name!r} needs CPU parameters and the Gloo backend, got {device.type} parameters and "
            f"{backend_of(group, device)}; use transport='auto'"
        )


def connect_transport(
    name: str, group: dist.ProcessGroup, device: torch.device, *, share_parameters: bool = False
) -> Transport:
    """The transport called `name`. Collective: all ranks of the group call it with the same arguments.

    "auto" takes torch's own collectives, except for Gloo on the CPU: there, shared memory where all ranks are on one host,
    shared memory and messages where there are several hosts with as many ranks each, and messages everywhere else. Where
    memory cannot be shared, it says so in the log of rank 0, and takes messages.

    Raises:
        ConfigError: on all ranks: they cannot share memory, and "shm" or `share_parameters` insists on it.
    """
    if group.size() == 1:
        return SingleTransport(group)
    if name == "pairwise" or not _is_gloo_on_cpu(group, device) or name == "torch":
        if share_parameters:
            raise ConfigError(f"share_parameters=True needs ranks that share memory; transport={name!r} does not")
        return PairwiseTransport(group) if name == "pairwise" else TorchTransport(group, device)
    try:
        shared = _connect_shared(name, group)
        if shared is not None:
            return shared
        reason = "no two ranks are on one host"
    except SharedMemoryError as error:
        reason = str(error)
        if name == "auto" and not share_parameters and group.rank() == 0:
            _log.warning("ranks do not share memory, gradients and parameters go through messages: %s", reason)
    if name == "shm" or share_parameters:
        option = "share_parameters=True" if share_parameters else "transport='shm'"
        raise ConfigError(f"{option} needs ranks that share memory: {reason}; leave it out to use messages instead")
    return PairwiseTransport(group)


def _connect_shared(name: str, group: dist.ProcessGroup) -> Transport | None:
    """None when there is nothing to share; SharedMemoryError when it cannot be shared."""
    hosts = ranks_by_host(ControlGroup(group))
    if len(hosts) == 1:
        return ShmTransport(group, hosts[0])
    sizes = [len(ranks) for ranks in hosts]
    if name == "shm":
        raise SharedMemoryError(f"the ranks are on {len(hosts)} hosts, for which transport='auto' is made")
    if max(sizes) == 1:
        return None
    if min(sizes) != max(sizes):
        raise SharedMemoryError(f"hosts have different numbers of ranks, {sizes}")
    return HybridTransport(group, hosts)


def _is_gloo_on_cpu(group: dist.ProcessGroup, device: torch.device) -> bool:
    return device.type == "cpu" and "gloo" in backend_of(group, device)


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """Name of the backend that serves `device` in this group, for example "gloo"."""
    config = str(dist.get_backend_config(group))  # for example "cpu:gloo,cuda:nccl"
    backends = dict(entry.split(":") for entry in config.split(",") if ":" in entry)
    return backends.get(device.type, str(dist.get_backend(group)))
