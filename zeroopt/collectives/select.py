"""Picks the transport for a process group and the device that the parameters live on."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from ..errors import ConfigError
from ..options.checks import as_text, check_one_of
from .all_to_all import AllToAllTransport
from .base import Transport
from .hierarchy import HierarchyTransport
from .hybrid import HybridTransport
from .lone import is_lone
from .pairwise import PairwiseTransport
from .shared_memory import SharedMemoryError
from .shm import ShmTransport
from .single import SingleTransport
from .site import Site
from .torch_native import TorchTransport
from .tree import TreeTransport, messages_among

TransportFactory = Callable[[dist.ProcessGroup, torch.device], Transport]
"""Makes a transport of one's own for a process group and the device of its buckets. Called by all ranks of the group."""

TRANSPORTS: dict[str, type[Transport]] = {
    "torch": TorchTransport,
    "all_to_all": AllToAllTransport,
    "hierarchy": HierarchyTransport,
    "pairwise": PairwiseTransport,
    "tree": TreeTransport,
    "shm": ShmTransport,
}
"""What may be asked for by name."""

# "auto" takes the first of them that serves the group.
_IN_TURN: tuple[type[Transport], ...] = (
    SingleTransport,
    ShmTransport,
    HybridTransport,
    TreeTransport,
    PairwiseTransport,
    AllToAllTransport,
    HierarchyTransport,
    TorchTransport,
)

_log = logging.getLogger("zeroopt")


def check_transport(choice: str | TransportFactory, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ConfigError when there is no such transport, or it cannot serve that backend or device. Not collective."""
    check_transport_at(choice, Site(group, device))


def check_transport_at(choice: str | TransportFactory, site: Site) -> None:
    """Likewise, for ranks that need not be there yet."""
    if callable(choice):
        return
    check_one_of("transport", choice, ("auto", *TRANSPORTS))
    if choice == "auto" or is_lone(site.group) or not TRANSPORTS[choice].needs_gloo_on_cpu:
        return
    if not site.has_gloo_on_cpu:
        raise ConfigError(
            f"transport={choice!r} needs CPU parameters and the Gloo backend, got {site.device.type} parameters and "
            f"{site.backend}; use transport='auto'"
        )


def connect_transport(
    choice: str | TransportFactory,
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    share_parameters: bool = False,
    nests: bool = True,
) -> Transport:
    """The transport of that name, or that a factory makes. Collective: all ranks of the group call it with the same arguments.

    "auto" takes torch's own collectives, on devices of one host an all-to-all and sums of ours, on those of several hosts with as many
    ranks each the same in two levels. For Gloo on the CPU, it takes shared
    memory where all ranks are on one host, shared memory and messages where there are several hosts with as many ranks each, and
    messages everywhere else, in rounds among many ranks. Where memory cannot be shared, it says so in the log of rank 0, and takes
    messages.

    Args:
        nests: sums of some ranks' slices may travel on, as they do where there are several hosts; else messages are taken.

    Raises:
        ConfigError: on all ranks: they cannot share memory, and "shm" or `share_parameters` insists on it. On a rank whose
            factory gives something else than a transport of the group.
    """
    if callable(choice):
        return _made_by(choice, group, device, share_parameters=share_parameters)
    site = Site(group, device)
    kind = kind_for(choice, site, nests=nests)
    if share_parameters and not kind.shares_parameters and (choice != "auto" or not site.has_gloo_on_cpu):
        raise ConfigError(f"share_parameters=True needs ranks that share memory; transport={choice!r} does not")
    try:
        if share_parameters and not kind.shares_parameters:
            raise SharedMemoryError("no two ranks are on one host")
        return kind.connect(site)
    except SharedMemoryError as error:
        reason = str(error)  # the text alone: who keeps the error keeps what it has passed through, such as open memory
    if choice != "auto" or share_parameters:
        option = "share_parameters=True" if share_parameters else f"transport={choice!r}"
        raise ConfigError(f"{option} needs ranks that share memory: {reason}; leave it out to use messages instead")
    if group.rank() == 0:
        _log.warning("ranks do not share memory, gradients and parameters go through messages: %s", reason)
    return messages_among(group.size()).connect(site)


def kind_for(choice: str, site: Site, *, nests: bool) -> type[Transport]:
    """The class of the transport of that name. Collective as far as `site` is.

    Args:
        nests: as for `connect_transport`.
    """
    if choice == "auto" or site.group.size() == 1:
        return next(kind for kind in _IN_TURN if kind.serves(site) and (nests or not kind.sums_twice))
    return TRANSPORTS[choice]  # which says itself why it cannot, if it cannot


def _made_by(
    factory: TransportFactory, group: dist.ProcessGroup, device: torch.device, *, share_parameters: bool
) -> Transport:
    made = factory(group, device)
    if not isinstance(made, Transport):
        raise ConfigError(
            f"expected transport={as_text(factory)} to make a zeroopt.collectives.Transport, got {type(made).__name__}"
        )
    if made.control.group is not group or made.num_slices != group.size():
        raise ConfigError(
            f"expected transport={as_text(factory)} to make a transport of the process group that it is given, of "
            f"{group.size()} ranks, got one of another group that cuts buckets into {made.num_slices} slices"
        )
    if share_parameters and not made.shares_parameters:
        raise ConfigError(f"share_parameters=True needs ranks that share memory; transport {made.name!r} does not")
    return made
