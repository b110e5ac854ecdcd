"""CUDA graphs of the model: they replay the addresses at which parameters were when they were captured.

So parameters stay where they are once there is a graph, and so does what a step that was captured works on. Otherwise it would go on
reading, and differentiating by, memory that is somebody else's, without a word.

What is captured runs no Python when it is replayed: neither would a step outside of the graph know that there are gradients, nor a
backward outside that a step has been taken. So a step belongs into the graph of its backward, and a backward into that of its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import StateError
from ..feature import Feature, Step
from ..parameters.gathers import ParamGathers
from ..storage.bucket import Bucket
from ..streams import capture_number
from ..untraced import untraced


class Captures(Feature):
    """Sees that a CUDA graph is captured while the model runs forward or backward, or one of its optimizers steps.

    Attributes:
        exist: this rank has captured one.
        hold_steps: one of them has a step in it.

    Args:
        device: of the parameters.
        gathers: of the model, for whose readers a graph does not wait when it is replayed.
    """

    def __init__(self, device: torch.device, gathers: ParamGathers) -> None:
        self._device = device
        self._gathers = gathers
        self.exist = self.hold_steps = False
        # By the captures, or 0, in which gradients have come: the buckets of which they have been cleared since, by index.
        self._backwards: dict[int, set[int]] = {}

    @untraced
    def look(self) -> int:
        """The number of the capture that is on, or 0. Not collective."""
        return self._look()

    def _look(self) -> int:
        """Where nothing is traced anyway."""
        number = capture_number(self._device)
        if number:
            self.exist = self._gathers.are_read_by_graphs = True
        return number

    def backward_begins(self) -> None:
        self._backwards[self._look()] = set()

    def local_backward_runs(self) -> None:
        self.backward_begins()

    def gradients_cleared(self, buckets: Sequence[Bucket] | None) -> None:
        if buckets is None:
            self._backwards.clear()
        for cleared in self._backwards.values():
            cleared.update(bucket.index for bucket in buckets or ())

    def before_step(self, step: Step) -> None:
        number = self._look()
        stepped = {bucket.index for bucket in step.buckets}
        if any(other != number and not stepped <= cleared for other, cleared in self._backwards.items()):
            raise StateError(
                "a backward was captured in a CUDA graph, and step() is not captured with it: a replay would tell nobody that there "
                "are gradients. Capture backward and step() in one graph, or neither"
                if not number
                else "step() is captured in a CUDA graph, and a backward whose gradients it takes is not: a replay would tell nobody "
                "that they have been used. Capture backward and step() in one graph, and clear gradients before"
            )

    def after_step(self, step: Step) -> None:
        if self._look():  # not before: what fails leaves no graph that could be replayed
            self.hold_steps = True

    def check_may_leave(self) -> None:
        """Raise StateError when parameters must not leave their buckets. Not collective."""
        if self.exist:
            raise StateError(
                "parameters cannot leave the param_groups: a CUDA graph of this model has been captured, and would go on reading the "
                "memory where they were. Take them out before capturing"
            )

    def check_may_replace_state(self, what: str) -> None:
        """Raise StateError when the arrays that a step works on must not be replaced. Not collective.

        Args:
            what: is about to replace them.
        """
        if self.hold_steps:
            raise StateError(
                f"{what} would replace the optimizer's state: a CUDA graph of a step has been captured, and would go on with the state "
                "that there was. Do it before capturing"
            )
