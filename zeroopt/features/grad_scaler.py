"""Steps through a `torch.amp.GradScaler`: all ranks leave out the same ones.

A GradScaler looks at the gradients of its own rank, leaves out `optimizer.step()` when one of them is not finite, and changes
its scale accordingly. Here a rank looks at its slices only, and all ranks have to leave out the same steps. So they tell each
other what they have found: in stages 1 and 2 where `unscale_` looks (`ShardedView.check_and_unscale`), and for what is
left when the scaler's `step()` begins, in which it asks every optimizer for `_step_supports_amp_scaling`.

It does not say who asks, so its own frame is looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from ..feature import Feature, Step
from ..gradients.overflow import Obstacle, agree_on_overflow
from ..gradients.sharded_view import ShardedView
from ..storage.factors import scale_sums
from ..trained import Trained
from ..transfers import pins_for
from .clipping import Clipping
from .join import Join, Phase


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
    def scale(self) -> Tensor | float:
        """By which losses are multiplied; where it lies."""
        scale: Tensor | None = self._scaler._scale
        return float(self._scaler.get_scale()) if scale is None else scale

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

    def tell(self, overflow: bool) -> None:
        """Let it read what ranks have agreed on. It is on the host, so that the host does not wait for a device once more; `update`
        sends it there."""
        found = self._state["found_inf_per_device"]
        for device, flag in found.items():
            found[device] = torch.full_like(flag, float(overflow), device="cpu", pin_memory=pins_for(flag.device))

    def skip(self) -> None:
        """Let it go on as when it has unscaled gradients: having found an overflow it will not step, or tell a step of it."""
        self._state["stage"] = OptState.UNSCALED


class GradScaling(Feature):
    """What ranks agree on when a GradScaler's `step()` begins. On in steps that a scaler calls whatever it has found.

    Args:
        optimizer: what the scaler knows the optimizer as.
    """

    def __init__(self, trained: Trained, optimizer: torch.optim.Optimizer, join: Join, clipping: Clipping) -> None:
        self._trained = trained
        self._replica = trained.replica
        self._optimizer_that_has_this = weakref.ref(optimizer)
        self._join = join
        self._clipping = clipping

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer_that_has_this()
        assert optimizer is not None  # whose step it is
        return optimizer

    @property
    def unscale_in_step(self) -> bool:
        """Whether a GradScaler refuses to unscale gradients. In stages 1 and 2 their sums are float32."""
        return self._replica.reducer.view.is_plain and any(b.dtype is torch.float16 for b in self._trained.buckets)

    def begin(self, scaler: GradScaler) -> bool:
        """Whether the step is to be left out, which the scaler then knows. Collective.

        Raises:
            StateError: on every rank: scales differ, or some rank has no gradients, or others that are still multiplied.
        """
        scaled = ScaledStep(scaler, self._optimizer)
        obstacle = Obstacle.SCALED_PEERS if self._has_scaled_peers(scaler) else None
        if obstacle is None and not scaled.is_unscaled:
            scaled.look(unscale=not self.unscale_in_step)
        if obstacle is None and not scaled.found:
            obstacle = Obstacle.NO_GRADIENTS
        overflow = self.agree(self._found(scaled), scaled.scale, obstacle)
        scaled.tell(overflow)
        if overflow:
            scaled.skip()
        return overflow

    def _found(self, scaled: ScaledStep) -> Tensor | bool:
        """Whether this rank has found an overflow: in stages 1 and 2, any rank."""
        view = self._replica.reducer.view
        if isinstance(view, ShardedView):
            return any(map(view.has_found, scaled.found))
        device = self._trained.buckets[0].device
        found = [each.reshape(()).to(device) != 0 for each in scaled.found]
        return torch.stack(found).any() if found else False

    def agree(self, found: Tensor | bool, scale: Tensor | float = 0.0, obstacle: Obstacle | None = None) -> bool:
        """Whether any rank has found a gradient that is not finite, ranks with other parts of the model too. Collective.

        Args: as those of `agree_on_overflow`.
        """
        replica, reducer = self._replica, self._replica.reducer
        if self._join.is_on:
            self._join.announce(Phase.OVERFLOW, self._trained.number, bool(found))
        device = self._trained.buckets[0].device
        # In stages 1 and 2 the ranks have agreed when each one's gradients were looked at.
        if reducer.view.is_plain or obstacle is not None:
            found = agree_on_overflow(replica.transport, device, found=found, scale=scale, obstacle=obstacle)
        overflow = replica.norm_groups.any_over_model(bool(found), device)
        if overflow:
            reducer.note_skipped_step()
            self._clipping.note_overflow()
        return overflow

    def on_gradients(self, step: Step) -> None:
        """Leave the step out where the scaler has found an overflow, on which all ranks have agreed. If it has not, multiply
        gradients back, where it has left that to the step."""
        if step.found_inf is None:
            return
        if bool(step.found_inf):
            step.is_skipped = True
            step.active.zero_()
        elif step.grad_scale is not None:
            # As a GradScaler rounds it: gradients are the same wherever they are multiplied by it.
            inverse = step.grad_scale.detach().double().reshape(()).reciprocal().float().double()
            scale_sums((store for store in step.stores if store.holds_sum), inverse)
            self._replica.reducer.view.changed()

    def _has_scaled_peers(self, scaler: GradScaler) -> bool:
        """Whether gradients of other optimizers, by whose norm this one is to clip, are still multiplied."""
        replica = self._replica
        if replica.config.max_grad_norm is None:
            return False
        others = [each for each in replica.optimizers if each is not self._optimizer]
        groups = [
            group for other in others if not ScaledStep(scaler, other).is_unscaled for group in other.param_groups
        ]
        scaled = {param for group in groups for param in group["params"] if param.grad is not None}
        checked = replica.reducer.view.checked
        return any(managed.param in scaled and managed.index not in checked for managed in replica.params)
