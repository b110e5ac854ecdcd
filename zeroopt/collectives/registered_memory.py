"""Buckets in memory that the backend has allocated and registered itself.

With NCCL that is memory of `ncclMemAlloc`, which torch registers with the communicator when it is taken. NCCL may then leave out copies
of its own and use fewer of the device's multiprocessors; whether it does depends on its release, its algorithm and the links
between the devices, and has not been measured. The memory comes from no cache, in pieces of 2 MiB or more, so every buffer takes up to
that much more.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .base import Transport
from .select import connect_transport
from .torch_native import TorchTransport


def registered(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """What "auto" takes for a device, with buckets in memory that the backend has registered: for `wrap(transport=registered)`.
    Collective. A rank alone has nobody to register memory for, and gets what it would get anyway.

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
    backend = group._get_backend(device)
    offers = getattr(backend, "supports_tensor_alloc", None)
    if offers is None or not offers(device):
        why = f"torch {torch.__version__} does not" if offers is None else f"backend {backend.name()!r} does not here"
        raise ConfigError(
            f"transport=registered needs torch 2.8 or newer and a backend that allocates memory for {device}, as NCCL does: {why}; "
            "use transport='auto'"
        )
    transport.allocator = backend
    return transport
