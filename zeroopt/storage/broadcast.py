"""One rank's tensors for everyone: parameters when wrapping, buffers before a forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import PendingCollective
from ..collectives.base import PendingWork
from ..collectives.failure import the_other_rank
from ..plan.dtensors import local_of

_TAG = 1 << 23  # out of the way of a user's own messages on the same group


class Broadcaster:
    """Sends tensors of one rank of a process group, the first if nothing else is said, to its other ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite the tensors with those of rank `source` of the group. Collective: all ranks pass the same shapes and
        dtypes. Of DTensors, ranks hold the same part.

        Tensors of one dtype travel together, since small messages cost more than the copy.
        """
        for alike in group_alike(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            self.broadcast_flat(flat, source)
            if self.group.rank() != source:
                for tensor, piece in zip(alike, pieces_of(flat, alike), strict=True):
                    tensor.copy_(piece)

    @torch.no_grad()
    def start(self, tensors: Sequence[Tensor], source: int, what: str) -> tuple[Tensor, PendingCollective]:
        """Start to send tensors of one dtype and device as one flat tensor, and return that. Collective.

        Args:
            what: is going on, for messages.
        """
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        work = dist.broadcast(flat, dist.get_global_rank(self.group, source), group=self.group, async_op=True)
        return flat, PendingWork(what, [(the_other_rank(self.group), work)], (flat,))

    @torch.no_grad()
    def broadcast_among(self, tensor: Tensor, ranks: Sequence[int]) -> None:
        """Overwrite one contiguous tensor in place on some ranks of the group, the first of which is rank 0. Only they call
        it, or all do: for the others it does nothing."""
        rank = self.group.rank()
        if rank == 0:
            for work in [self.group.send([tensor], other, _TAG) for other in ranks[1:]]:
                work.wait()
        elif rank in ranks:
            self.group.recv([tensor], 0, _TAG).wait()

    @torch.no_grad()
    def broadcast_flat(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite one contiguous tensor in place. Collective."""
        dist.broadcast(tensor, dist.get_global_rank(self.group, source), group=self.group)


def group_alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """What a rank holds of tensors, those of one dtype and device together."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in map(local_of, tensors):
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(by_kind.values())


def pieces_of(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat tensor in the shapes of those that were put together into it."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
