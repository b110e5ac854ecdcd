"""Buckets in memory that the backend has allocated and registered itself, or in torch's symmetric memory.

With NCCL that is memory of `ncclMemAlloc`, which torch registers with the communicator when it is taken. NCCL may then leave out copies
of its own and use fewer of the device's multiprocessors; whether it does depends on its release, its algorithm and the links
between the devices, and has not been measured. The memory comes from no cache, in pieces of 2 MiB or more, so every buffer takes up to
that much more.

Symmetric memory (`torch.distributed._symmetric_memory`) is registered on all ranks together, as a window, for which NCCL from 2.27 on has
kernels of its own. torch gets it from one of several sources, by a setting of the process, and only that called "NCCL" tells NCCL of it.

Either belongs to one communicator, so buckets travel flat, whatever the number of hosts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from .base import Transport
from .hierarchy import HierarchyTransport
from .select import connect_transport
from .torch_native import TorchTransport

_SOURCE = "NCCL"  # of symmetric memory, as torch calls it


def registered(group: dist.ProcessGroup, device: torch.device, *, symmetric: bool = False) -> Transport:
    """What "auto" takes for a device, flat, with buckets in memory that the backend has registered: for `wrap(transport=registered)`.
    Collective. A rank alone has nobody to register memory for, and gets what it would get anyway.

    Args:
        symmetric: in torch's symmetric memory, `wrap(transport=partial(registered, symmetric=True))`; no GPU has tried it yet.

    Raises:
        ConfigError: torch (before 2.8) or the backend offers no such memory for this device.
    """
    transport = connect_transport("auto", group, device)
    if group.size() == 1:
        return transport
    if not isinstance(transport, TorchTransport):
        raise ConfigError(
            f"transport=registered is for parameters on a GPU, got {device}, for which transport='auto' takes {transport.name!r}"
        )
    if isinstance(transport, HierarchyTransport):
        transport = TorchTransport(group, device)
    transport.allocator = _symmetric_memory(group, device) if symmetric else allocating_backend(group, device)
    return transport


def allocating_backend(group: dist.ProcessGroup, device: torch.device) -> Any:
    """The backend of a group that serves a device, if it allocates memory there; else ConfigError."""
    backend = group._get_backend(device)
    offers = getattr(backend, "supports_tensor_alloc", None)
    if offers is None or not offers(device):
        why = f"torch {torch.__version__} does not" if offers is None else f"backend {backend.name()!r} does not here"
        raise ConfigError(
            f"transport=registered needs torch 2.8 or newer and a backend that allocates memory for {device}, as NCCL does: {why}; "
            "use transport='auto'"
        )
    return backend


def _symmetric_memory(group: dist.ProcessGroup, device: torch.device) -> _SymmetricMemory:
    try:
        from torch.distributed import _symmetric_memory as module

        source = module.get_backend(device)
    except (ImportError, AttributeError, RuntimeError):  # before it was there, or a build without it
        source = None
    if source != _SOURCE:
        found = "there is none" if source is None else f"it is from {source!r}, of which the collectives know nothing"
        raise ConfigError(
            f"registered(symmetric=True) needs torch's symmetric memory on {device}, from {_SOURCE!r}: {found}; call "
            f"torch.distributed._symmetric_memory.set_backend({_SOURCE!r}) before any is taken, or use transport=registered"
        )
    return _SymmetricMemory(module, group)


class _SymmetricMemory:
    """Allocates as a backend does. All ranks of the group take the same buckets in the same order.

    Args:
        module: torch's.
    """

    def __init__(self, module: Any, group: dist.ProcessGroup) -> None:
        self._module = module
        self._group = group

    def allocate_tensor(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer: Tensor = self._module.empty(numel, dtype=dtype, device=device)
        self._module.rendezvous(buffer, self._group)
        return buffer
