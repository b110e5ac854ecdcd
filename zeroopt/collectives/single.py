"""The collectives of a group of one: nothing moves."""

from __future__ import annotations

from torch import Tensor

from .base import Transport
from .pending import Done, PendingCollective
from .site import Site
from .wire import PLAIN, Wire


class SingleTransport(Transport):
    """Reduces and gathers at once: for a group of one."""

    name = "single"
    needs_staging = False
    shares_parameters = True
    is_local = True

    @classmethod
    def serves(cls, site: Site) -> bool:
        return site.group.size() == 1

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        if base is not None or out.data_ptr() != full.data_ptr() or not wire.backend_sums:
            wire.combine([full], out, base)
        return Done()

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        return Done()

    def start_max(self, flags: Tensor, out: Tensor, *, label: str = "flags") -> PendingCollective:
        out.copy_(flags)
        return Done()

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        return value.reshape(1)

    def barrier(self) -> None:
        pass
