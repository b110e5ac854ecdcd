"""What `prepare` makes of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from ...errors import StateError
from ...optimizer import ZeroOptimizer
from ...unwrap import UnwrappedOptimizer


class PreparedOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """Accelerate's wrapper of an optimizer, and once the model that has its parameters is prepared, too, of what `zeroopt.wrap` has
    made of it. Until then it refuses to step."""

    @property
    def awaits_model(self) -> bool:
        """Whether it has not been wrapped by zeroopt yet. What `zeroopt.unwrap` has undone awaits nothing any more."""
        return not isinstance(self.optimizer, (ZeroOptimizer, UnwrappedOptimizer))

    def become(self, wrapped: ZeroOptimizer) -> None:
        """From now on be around the optimizer that `zeroopt.wrap` has made."""
        self.__setstate__({"optimizer": wrapped})  # which also renews what it has kept of the former one's step

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """As Accelerate's: where gradients are to be synchronized. Collective then.

        Raises:
            StateError: the model is not prepared: nothing has averaged the gradients.
        """
        if self.awaits_model:
            raise StateError(
                "this optimizer has been prepared, and the model that has its parameters has not: give both to "
                "accelerator.prepare(), together or one after the other (prepare_model(model, evaluation_mode=True) is for models "
                "that are not trained)"
            )
        super().step(closure)


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer behind Accelerate's wrappers: a `ZeroOptimizer` once its model is prepared, too."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
