"""Buffers (batch norm statistics and the like) that follow those of one rank, as under DistributedDataParallel.

The first forward with gradients after a synchronised backward takes them over, and so does one that follows another outside of
`no_sync()` before any backward; all ranks do so together. What evaluation needs is sent at the end of each backward, in which
all ranks take part anyway: a forward without gradients takes over what has come, and needs nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..collectives import ControlGroup, PendingCollective
from ..collectives.flat import group_alike, pieces_of
from ..plan.dtensors import local_of
from ..streams import note_use
from ..untraced import untraced


class BufferSync:
    """Lets the buffers of one wrapped model be those of one of its ranks."""

    def __init__(self, module: nn.Module, control: ControlGroup) -> None:
        self._is_reduced = True  # by a backward since the last forward; or there was no forward yet
        self._is_open = False  # the last forward was outside of no_sync(), and no backward within has followed
        self._module = module
        self._control = control
        self._sent: list[tuple[list[Tensor], list[int], Tensor, PendingCollective]] = []

    @property
    def is_due(self) -> bool:
        """Whether the next forward with gradients takes buffers over. That happens equally often on all ranks that run as many
        synchronised backward passes, however many others they run in between, and wherever they call the forwards of those."""
        return self._is_reduced or self._is_open

    def note_forward(self, *, sync: bool) -> None:
        """There was a forward with gradients, `sync` tells whether outside of `no_sync()`."""
        self._is_reduced, self._is_open = False, sync

    def note_local_backward(self) -> None:
        """There was a backward under `no_sync()`."""
        self._is_open = False

    def take_over(self, source: int) -> None:
        """Take over the buffers that rank `source` of the group has now. Collective."""
        self._drop_sent()
        buffers = list(self._module.buffers())
        what = f"forward, taking over the buffers of rank {source}"
        with _unnoticed(buffers):
            self._control.broadcast([local_of(buffer) for buffer in buffers], source, what)

    def send(self, source: int) -> None:
        """A synchronised backward is through: start to send the buffers that rank `source` has now, for `take_sent`. Collective."""
        self._is_reduced = True
        self._drop_sent()
        what = f"sending the buffers of rank {source}"
        for tensors in group_alike(map(local_of, self._module.buffers())):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
            pending = self._control.start_broadcast(flat, source, what)
            self._sent.append((tensors, list(map(_version, tensors)), flat, pending))
        self._source = source

    @torch.no_grad()
    @untraced
    def take_sent(self) -> None:
        """Take over what was sent at the end of the last backward, but for buffers that were written since. Not collective."""
        sent, self._sent = self._sent, []
        for tensors, versions, flat, pending in sent:
            pending.finish()
            if self._control.rank == self._source:
                continue
            note_use(flat)
            for tensor, version, piece in zip(tensors, versions, pieces_of(flat, tensors), strict=True):
                if _version(tensor) == version:
                    with _unnoticed([tensor]):
                        tensor.copy_(piece)

    def wait_for_sent(self) -> None:
        """Wait until what was sent has come. At the end of the process nothing should be on its way."""
        for *_, pending in self._sent:
            pending.finish()

    def _drop_sent(self) -> None:
        self.wait_for_sent()
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
