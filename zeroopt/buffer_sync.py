"""Buffers (batch norm statistics and the like) that follow those of one rank, as under DistributedDataParallel.

A forward with gradients takes them over, if the one before it was synchronised; all ranks do so together. What evaluation
needs is sent at the end of each backward, in which all ranks take part anyway: a forward without gradients takes over what
has come, and needs nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from .broadcast import Broadcaster, group_alike, pieces_of
from .collectives import PendingCollective, named_failures
from .untraced import untraced


class BufferSync:
    """Lets the buffers of one wrapped model be those of one of its ranks.

    Attributes:
        is_due: the next forward with gradients takes buffers over. The same on all ranks that run as many synchronised
            forwards, however many others they run.
    """

    def __init__(self, module: nn.Module, broadcaster: Broadcaster) -> None:
        self.is_due = True
        self._module = module
        self._broadcaster = broadcaster
        self._sent: list[tuple[list[Tensor], list[int], Tensor, PendingCollective]] = []

    def take_over(self, source: int) -> None:
        """Take over the buffers that rank `source` of the group has now. Collective."""
        self._drop_sent()
        buffers = list(self._module.buffers())
        what = f"forward, taking over the buffers of rank {source}"
        with named_failures(what, self._broadcaster.group), _unnoticed(buffers):
            self._broadcaster.broadcast(buffers, source)

    def send(self, source: int) -> None:
        """Start to send the buffers that rank `source` has now, for `take_sent`. Collective."""
        self._drop_sent()
        what = f"sending the buffers of rank {source}"
        self._sent = [
            (tensors, list(map(_version, tensors)), *self._broadcaster.start(tensors, source, what))
            for tensors in group_alike(self._module.buffers())
        ]
        self._source = source

    @torch.no_grad()
    @untraced
    def take_sent(self) -> None:
        """Take over what was sent at the end of the last backward, but for buffers that were written since. Not collective."""
        sent, self._sent = self._sent, []
        for tensors, versions, flat, pending in sent:
            pending.finish()
            if self._broadcaster.group.rank() == self._source:
                continue
            for tensor, version, piece in zip(tensors, versions, pieces_of(flat, tensors), strict=True):
                if _version(tensor) == version:
                    with _unnoticed([tensor]):
                        tensor.copy_(piece)

    def _drop_sent(self) -> None:
        for *_, pending in self._sent:
            pending.finish()
        self._sent.clear()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _unnoticed(tensors: Sequence[Tensor]) -> ExitStack:
    """Within it, autograd takes no notice of writing: a backward of another forward may have yet to run, for which a buffer
    counts as unchanged when all that has come is another rank's copy of it."""
    stack = ExitStack()
    for tensor in tensors:
        if not tensor.is_inference():
            stack.enter_context(_unsafe_preserve_version_counter(tensor))  # torch 2.4 takes no tuple of them
    return stack
