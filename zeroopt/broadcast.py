"""One rank's tensors for everyone: parameters when wrapping, buffers before a forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .local_tensor import local_of

_TAG = 1 << 23  # out of the way of a user's own messages on the same group


class Broadcaster:
    """Sends tensors of one rank of a process group, the first if nothing else is said, to its other ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite the tensors with those of rank `source` of the group. Collective: all ranks pass the same shapes and
        dtypes. Of DTensors, ranks hold the same part.

        Tensors of one dtype travel together, since small messages cost more than the copy.
        """
        by_dtype: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in map(local_of, tensors):
            by_dtype.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in by_dtype.values():
            self._broadcast_together(alike, source)

    def _broadcast_together(self, tensors: Sequence[Tensor], source: int) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.broadcast_flat(flat, source)
        if self._group.rank() == source:
            return
        for tensor, piece in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view(tensor.shape))

    @torch.no_grad()
    def broadcast_among(self, tensor: Tensor, ranks: Sequence[int]) -> None:
        """Overwrite one contiguous tensor in place on some ranks of the group, the first of which is rank 0. Only they call
        it, or all do: for the others it does nothing."""
        rank = self._group.rank()
        if rank == 0:
            for work in [self._group.send([tensor], other, _TAG) for other in ranks[1:]]:
                work.wait()
        elif rank in ranks:
            self._group.recv([tensor], 0, _TAG).wait()

    @torch.no_grad()
    def broadcast_flat(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite one contiguous tensor in place. Collective."""
        dist.broadcast(tensor, dist.get_global_rank(self._group, source), group=self._group)
