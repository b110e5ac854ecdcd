"""What a `torch.amp.GradScaler` asks of an optimizer, agreed by all ranks.

A GradScaler looks at the gradients of its own rank, leaves out `optimizer.step()` when one of them is not finite, and changes
its scale accordingly. Here a rank looks at its slices only, and all ranks have to leave out the same steps. So they tell each
other what they have found: in stages 1 and 2 where `unscale_` looks (`ShardedView.check_and_unscale`), and for what is
left when the scaler's `step()` begins, in which it asks every optimizer for `_step_supports_amp_scaling`.

It does not say who asks, so its own frame is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState


def scaler_in(frame: FrameType | None) -> GradScaler | None:
    """The GradScaler whose method runs in a frame, if one does."""
    owner = None if frame is None else frame.f_locals.get("self")
    return owner if isinstance(owner, GradScaler) else None


class ScaledStep:
    """What a GradScaler knows of one optimizer, from when its `step()` has begun until it looks at it itself."""

    def __init__(self, scaler: GradScaler, optimizer: torch.optim.Optimizer) -> None:
        self._scaler = scaler
        self._optimizer = optimizer
        self._state = scaler._per_optimizer_states[id(optimizer)]

    @property
    def scale(self) -> float:
        """By which losses are multiplied."""
        return float(self._scaler.get_scale())

    @property
    def is_unscaled(self) -> bool:
        """Whether `unscale_` has been called since the last `update`."""
        return self._state["stage"] is not OptState.READY

    @property
    def found(self) -> Sequence[Tensor]:
        """One element for each device with gradients that the scaler has looked at: not 0 where one was not finite."""
        return list(self._state["found_inf_per_device"].values())

    def look(self, *, unscale: bool) -> None:
        """Have it look at the gradients, and multiply them back if they are to be."""
        if unscale:
            self._scaler.unscale_(self._optimizer)
        else:
            self._scaler._check_inf_per_device(self._optimizer)

    def skip(self) -> None:
        """Let it go on as when it has unscaled gradients and found an overflow: it will not step, or tell a step of it."""
        for each in self.found:
            each.fill_(1.0)
        self._state["stage"] = OptState.UNSCALED
