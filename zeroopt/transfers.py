"""Numbers on their way between the host and a device: queued, so that the host waits for none that it does not need."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import StateError
from .streams import ReadByGraphs, is_capturing


def pins_for(device: torch.device) -> bool:
    """Whether what goes to a device had better be in pinned memory, and torch makes that where it is not told for which device: before
    2.6 it did for CUDA alone."""
    if device.type in ("cpu", "meta"):
        return False
    accelerator = getattr(torch, "accelerator", None)
    return device.type == "cuda" or (accelerator is not None and accelerator.is_available())


def upload_into(target: Tensor, values: Tensor) -> None:
    """Let a tensor of a device have values of the host. They may be changed at once.

    Args:
        values: on the CPU, of the target's shape and dtype.

    Raises:
        StateError: a CUDA graph is captured, each replay of which would send the values of now.
    """
    if target.is_cpu or target.is_meta:
        target.copy_(values)
    elif is_capturing(target.device):
        raise StateError(
            "a CUDA graph is captured, and what it would send to the device (options of param_groups, which parameters have "
            "gradients, or where they lie) has changed since the last step: take one more step as it is now, then capture"
        )
    elif not pins_for(target.device):
        target.copy_(values)
    else:  # pinned, so that nobody waits for the copy; the allocator of pinned memory keeps it until the copy is done
        target.copy_(values.pin_memory(), non_blocking=True)


class Uploaded:
    """Numbers of the host on a device, sent again when they have changed. The CPU takes them as they are.

    They stay in one place, which is written on the stream that is current then: as everything that a step reads and writes.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_here = device.type == "cpu"
        self._device = device
        self._sent: Tensor | None = None
        self._there: Tensor | None = None
        self._read_by_graphs = ReadByGraphs()

    def hold(self, values: Tensor) -> Tensor:
        """These values on the device.

        Args:
            values: on the CPU, not to be changed any more.
        """
        if self._is_here:
            return values
        if self._there is None or self._sent is None or self._sent.shape != values.shape:
            self._there = torch.empty_like(values, device=self._device)
            self._sent = None
        if self._sent is None or not torch.equal(self._sent, values):
            upload_into(self._there, values)
            self._sent = values
        self._read_by_graphs.note(self._there, self._device)
        return self._there


class Download:
    """Numbers of a device on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._source: Tensor | None = values  # kept until it has been copied: its memory may belong to another stream
        self._event = None
        if values.is_cpu:
            return
        if not pins_for(values.device):
            self._values = values.cpu()
        else:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True, device="cpu").copy_(
                values, non_blocking=True
            )
            module = torch.get_device_module(values.device)
            stream = module.current_stream(values.device)
            values.record_stream(stream)  # they may be dropped at once, and of another stream
            self._event = module.Event()
            self._event.record(stream)

    def read(self) -> Tensor:
        """They, on the CPU. Blocks until they are there."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        self._source = None
        return self._values
