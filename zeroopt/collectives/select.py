"""Picks the transport for a process group and the device that the parameters live on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .base import Transport
from .pairwise import PairwiseTransport
from .single import SingleTransport
from .torch_native import TorchTransport


def select_transport(
    name: str, group: dist.ProcessGroup, device: torch.device
) -> Callable[[dist.ProcessGroup], Transport]:
    """The kind of transport called `name`; "auto" takes pairwise for Gloo on the CPU and torch's own collectives elsewhere.

    Making one is left to the caller, since all ranks have to make the same ones on a group in the same order.

    Raises:
        ConfigError: the transport cannot serve that backend or device.
    """
    pairwise_works = device.type == "cpu" and "gloo" in backend_of(group, device)
    if name == "pairwise" and not pairwise_works:
        raise ConfigError(
            f"transport='pairwise' needs CPU parameters and the Gloo backend, got {device.type} parameters and "
            f"{backend_of(group, device)}; use transport='auto'"
        )
    if group.size() == 1:
        return SingleTransport
    if name == "pairwise" or (name == "auto" and pairwise_works):
        return PairwiseTransport
    return TorchTransport


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """Name of the backend that serves `device` in this group, for example "gloo"."""
    config = str(dist.get_backend_config(group))  # for example "cpu:gloo,cuda:nccl"
    backends = dict(entry.split(":") for entry in config.split(",") if ":" in entry)
    return backends.get(device.type, str(dist.get_backend(group)))
