"""A tensor of state that is the same for all of a parameter, such as a step count, as ranks send it to each other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """A tensor in memory of its own on the CPU, for what is pickled is not to name another rank's device.

    Attributes:
        values: as they were when it was sent.
        was_on_cpu: where torch's optimizers keep step counts, of CUDA parameters too, unless they are "capturable" or "fused".
    """

    values: Tensor
    was_on_cpu: bool

    @staticmethod
    def of(tensor: Tensor) -> Sent:
        """A copy: a view would be pickled with its whole storage."""
        return Sent(tensor.detach().to("cpu", copy=True), tensor.is_cpu)

    def at(self, device: torch.device) -> Tensor:
        """The tensor where it belongs with a parameter whose state is on that device, in memory of its own."""
        return self.values.to("cpu" if self.was_on_cpu else device, copy=True)

    def digest(self) -> str:
        """The same text for tensors of which no bit differs."""
        data = self.values.reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = f"{self.values.dtype} {list(self.values.shape)} {self.was_on_cpu}"
        return f"{kind} {hashlib.sha256(data).hexdigest()}"
