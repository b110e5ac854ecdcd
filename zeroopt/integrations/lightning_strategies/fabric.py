"""What a strategy of Fabric does: as DDP's, with `zeroopt.wrap` in the place of DistributedDataParallel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...unwrap import unwrap as zeroopt_unwrap
from .evaluated import allow_gradients, refuse_gradients
from .options import check_precision, split_options
from .saving import whole_state

if TYPE_CHECKING:
    from lightning.fabric.strategies.ddp import DDPStrategy as _Strategy
    from lightning.fabric.strategies.strategy import _BackwardSyncControl as _SyncControl
else:
    _Strategy = _SyncControl = object


class FabricStrategy(_Strategy):
    """Comes before the DDPStrategy of `lightning.fabric` or `lightning_fabric` among a class's bases.

    `model, optimizer = fabric.setup(model, optimizer)` wraps; processes, devices and samplers are left to DDP's.
    """

    def __init__(self, stage: int = 2, **options: Any) -> None:
        self._wrap_options, others = split_options({"stage": stage, **options}, super().__init__)
        super().__init__(**others)
        self._backward_sync_control = _BackwardSync()

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Wrap a model with its optimizers. Collective."""
        check_precision(self._wrap_options, self.precision)
        allow_gradients(module)
        model, wrapped = self._wrap_options.wrap_all(module, optimizers, self.root_device)
        return model, wrapped, scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """A model without optimizers is only evaluated, and stays as it is.

        With several ranks, a backward that gives a gradient to one of its parameters raises StateError, until it is set up with an
        optimizer: nobody would average it.
        """
        if self.world_size > 1:
            refuse_gradients(module)
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Raises RuntimeError: an optimizer is wrapped together with its model."""
        raise RuntimeError(self._err_msg_joint_setup_required())

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, which writes it, as the plain optimizer has it; elsewhere nothing. Collective."""
        return (
            whole_state(optimizer) if isinstance(optimizer, ZeroOptimizer) else super().get_optimizer_state(optimizer)
        )

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the norm of all gradients of the optimizer, without a pass of its own over them. Collective.

        Returns:
            The norm before clipping.

        Raises:
            RuntimeError: it is not finite, and `error_if_nonfinite` is set. `zero_grad()` then drops the gradients.
        """
        if not isinstance(optimizer, ZeroOptimizer):
            return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, error_if_nonfinite)
        self.precision.unscale_gradients(optimizer)
        norm = optimizer.clip_grad_norm_(max_norm, norm_type)
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"the norm of order {norm_type} of all gradients is {norm.item()}, so they cannot be clipped; to go on all the same, "
                "pass error_if_nonfinite=False"
            )
        return norm


class _BackwardSync(_SyncControl):
    """Behind `fabric.no_backward_sync(model)`."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Backward passes within it communicate nothing."""
        if not enabled:
            return nullcontext()
        if not isinstance(module, ZeroDataParallel):
            raise TypeError(
                f"expected a model that fabric.setup(model, optimizer) has returned together with its optimizer, got {type(module).__name__}"
            )
        return module.no_sync()


def unwrap(model: Any, *optimizers: Any) -> Any:
    """Undo `fabric.setup(model, optimizer, …)`: the plain model and the plain optimizers again, each with its whole state. Collective.

    Args:
        model, optimizers: all that `fabric.setup` has returned, and the model was set up with.

    Raises:
        ConfigError: they are something else. On all ranks; nothing has been changed.
    """
    inner = getattr(model, "_forward_module", model)
    plain, states = zeroopt_unwrap(inner, [getattr(one, "_optimizer", one) for one in optimizers])
    return (plain, *states) if states else plain
