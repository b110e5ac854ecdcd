"""torch.distributed's own reduce-scatter and all-gather, for backends that have real ones (NCCL)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .base import PendingCollective, Transport

# torch 2.13 renamed both and warns when the former names are called.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchTransport(Transport):
    """Hands every bucket to the process group's backend as it is.

    `sent_bytes` counts what a ring sends, (N-1)/N of a bucket; a backend that emulates a collective sends more.
    """

    name = "torch"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group

    def start_reduce_scatter(self, full: Tensor, out: Tensor, base: Tensor | None = None) -> PendingCollective:
        # The sum has a place of its own when it is added to an earlier one.
        total = out if base is None else torch.empty_like(out)
        work = _reduce_scatter(total, full, group=self._group, async_op=True)
        self._count(full)
        return _PendingReduce(work, total, out, base)

    def start_all_gather(self, full: Tensor) -> PendingCollective:
        work = _all_gather(full, self.own_slice(full), group=self._group, async_op=True)
        self._count(full)
        return _PendingGather(work)

    def _count(self, full: Tensor) -> None:
        self.sent_bytes += full.nbytes // self.world_size * (self.world_size - 1)


@dataclass
class _PendingGather:
    work: dist.Work

    def finish(self) -> None:
        self.work.wait()


@dataclass
class _PendingReduce:
    work: dist.Work
    total: Tensor
    out: Tensor
    base: Tensor | None

    def finish(self) -> None:
        self.work.wait()
        if self.base is not None:
            torch.add(self.base, self.total, out=self.out)
