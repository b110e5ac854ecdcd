"""CUDA graphs of the model: they replay the addresses at which parameters were when they were captured.

So parameters stay where they are once there is a graph. Otherwise it would go on reading, and differentiating by, memory that is
somebody else's, without a word.
"""

from __future__ import annotations

import torch

from ..errors import StateError
from ..feature import Feature, Step
from ..parameters.gathers import ParamGathers
from ..streams import is_capturing
from ..untraced import untraced


class Captures(Feature):
    """Sees that a CUDA graph is captured while the model runs forward or backward, or one of its optimizers steps.

    Attributes:
        exist: this rank has captured one.

    Args:
        device: of the parameters.
        gathers: of the model, for whose readers a graph does not wait when it is replayed.
    """

    def __init__(self, device: torch.device, gathers: ParamGathers) -> None:
        self._device = device
        self._gathers = gathers
        self.exist = False

    @untraced
    def look(self) -> None:
        """Not collective."""
        if is_capturing(self._device):
            self.exist = self._gathers.are_read_by_graphs = True

    def backward_begins(self) -> None:
        self.look()

    def before_step(self, step: Step) -> None:
        self.look()

    def check_may_leave(self) -> None:
        """Raise StateError when parameters must not leave their buckets. Not collective."""
        if self.exist:
            raise StateError(
                "parameters cannot leave the param_groups: a CUDA graph of this model has been captured, and would go on reading the "
                "memory where they were. Take them out before capturing"
            )
