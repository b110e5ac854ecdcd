"""The steps of one optimizer through a GradScaler: all ranks leave out the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.amp.grad_scaler import GradScaler

from ..gradients.overflow import Obstacle, agree_on_overflow
from ..replica import Sharding
from ..storage.bucket import Bucket
from .join import Join, Phase
from .loss_scaling import ScaledStep


class ScaledSteps:
    """What ranks agree on when a GradScaler's `step()` begins.

    Args:
        buckets: of the optimizer; may become others.
    """

    def __init__(
        self, sharding: Sharding, join: Join, optimizer: torch.optim.Optimizer, buckets: Sequence[Bucket]
    ) -> None:
        self._sharding = sharding
        self._join = join
        self._optimizer = optimizer
        self._buckets = buckets

    @property
    def unscale_in_step(self) -> bool:
        """Whether a GradScaler refuses to unscale gradients. In stages 1 and 2 their sums are float32."""
        return self._sharding.reducer.view.is_plain and any(b.dtype is torch.float16 for b in self._buckets)

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
        found = any(bool(each) for each in scaled.found)
        overflow = self.agree(found, scaled.scale, obstacle)
        if overflow:
            scaled.skip()
        return overflow

    def agree(self, found: bool, scale: float = 0.0, obstacle: Obstacle | None = None) -> bool:
        """Whether any rank has found a gradient that is not finite, ranks with other parts of the model too. Collective.

        Args: as those of `agree_on_overflow`.
        """
        sharding, reducer = self._sharding, self._sharding.reducer
        if self._join.is_on:
            self._join.announce(Phase.OVERFLOW, sharding.optimizers.index(self._optimizer), found)
        device = self._buckets[0].device
        # In stages 1 and 2 the ranks have agreed when each one's gradients were looked at.
        if reducer.view.is_plain or obstacle is not None:
            found = agree_on_overflow(sharding.transport, device, found=found, scale=scale, obstacle=obstacle)
        return bool(sharding.norm_groups.max_over_model(torch.tensor(float(found), device=device)))

    def _has_scaled_peers(self, scaler: GradScaler) -> bool:
        """Whether gradients of other optimizers, by whose norm this one is to clip, are still multiplied."""
        sharding = self._sharding
        if sharding.config.max_grad_norm is None:
            return False
        others = [each for each in sharding.optimizers if each is not self._optimizer]
        groups = [
            group for other in others if not ScaledStep(scaler, other).is_unscaled for group in other.param_groups
        ]
        scaled = {param for group in groups for param in group["params"] if param.grad is not None}
        checked = sharding.reducer.view.checked
        return any(managed.param in scaled and managed.index not in checked for managed in sharding.params)
