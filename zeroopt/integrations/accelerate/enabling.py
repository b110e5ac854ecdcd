"""`enable`: an Accelerator goes on with zeroopt."""

from __future__ import annotations

from typing import Any, TypeVar

from accelerate import Accelerator

from ...errors import ConfigError, StateError
from .accelerator import ZeroMixin, with_zeroopt
from .kinds import check_kind
from .options import choose

AnyAccelerator = TypeVar("AnyAccelerator", bound=Accelerator)


def enable(accelerator: AnyAccelerator, stage: int = 2, **options: Any) -> AnyAccelerator:
    """Have an Accelerator's `prepare` use zeroopt in the place of DistributedDataParallel.

    Call it before anything that is to be trained is prepared, on every rank. A second call with the same options changes nothing.

    The accelerator stays the same object; its class becomes a subclass of the one that it had.

    Args:
        accelerator: also one that somebody else has made, such as `transformers.Trainer`.
        stage, options: those of `zeroopt.wrap`.

    Returns:
        The accelerator.

    Raises:
        ConfigError: there is no such option. Nothing has been changed.
        StateError: something has been prepared already. Nothing has been changed.
        NotSupportedError: the accelerator was set up for DeepSpeed, FSDP, Megatron-LM, XLA or model parallelism, which split the
            training state themselves. Nothing has been changed.
    """
    if not isinstance(accelerator, Accelerator):
        raise ConfigError(f"expected an accelerate.Accelerator, got {type(accelerator).__name__}")
    check_kind(accelerator)
    chosen = choose({"stage": stage, **options}, accelerator.ddp_handler)
    if isinstance(accelerator, ZeroMixin) and accelerator.zeroopt_options == chosen:
        return accelerator
    _check_in_time(accelerator)
    if not isinstance(accelerator, ZeroMixin):
        accelerator.__class__ = with_zeroopt(type(accelerator))  # type: ignore[arg-type]
    accelerator.zeroopt_options = chosen
    return accelerator


def _check_in_time(accelerator: Any) -> None:
    # Accelerate keeps the model itself and marks what it has put around it, if it has.
    in_ddp = any(not getattr(model, "_is_accelerate_prepared", False) for model in accelerator._models)
    if accelerator._optimizers or in_ddp:
        raise StateError(
            "this Accelerator has prepared a model or an optimizer already: call zeroopt.integrations.accelerate.enable before the "
            "first prepare(), or accelerator.free_memory() first and prepare all of them anew"
        )
