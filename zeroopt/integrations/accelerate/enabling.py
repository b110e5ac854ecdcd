"""`enable`: an Accelerator goes on with zeroopt."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import DistributedType

from ...errors import ConfigError, NotSupportedError, StateError
from .accelerator import ZeroMixin, with_zeroopt
from .options import choose

AnyAccelerator = TypeVar("AnyAccelerator", bound=Accelerator)

_STARTED = "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"  # how many processes torchrun or MPI has started
_SPLITS = "tp_size", "cp_size", "sp_size", "dp_shard_size"
_OTHERS = (
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
)


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
    _check_kind(accelerator)
    chosen = choose({"stage": stage, **options}, accelerator.ddp_handler)
    if isinstance(accelerator, ZeroMixin) and accelerator.zeroopt_options == chosen:
        return accelerator
    _check_in_time(accelerator)
    if not isinstance(accelerator, ZeroMixin):
        accelerator.__class__ = with_zeroopt(type(accelerator))  # type: ignore[arg-type]
    accelerator.zeroopt_options = chosen
    return accelerator


def _check_kind(accelerator: Any) -> None:
    kind = accelerator.distributed_type
    if kind in _OTHERS:
        raise NotSupportedError(
            f"this Accelerator was set up for {kind.value}, which splits the training state itself; zeroopt goes with plain data "
            "parallelism (MULTI_GPU, MULTI_CPU, one process): leave the plugin, its environment variables (ACCELERATE_USE_…) and the "
            "distributed_type of the accelerate config out"
        )
    sizes = {name: getattr(accelerator.parallelism_config, name, 1) for name in _SPLITS}
    split = next((name for name, size in sizes.items() if size > 1), None)
    if split is not None:
        raise NotSupportedError(
            f"this Accelerator was set up with {split}={sizes[split]}, which splits models; zeroopt goes with plain data parallelism here: "
            "leave parallelism_config out, or use zeroopt.wrap(process_group=…) with a mesh of your own"
        )
    started = max(int(os.environ.get(name, "1")) for name in _STARTED)
    if kind == DistributedType.NO and started > 1:
        raise StateError(
            f"{started} processes were started, and this Accelerator knows of one: on the CPU, pass Accelerator(cpu=True) or set "
            "ACCELERATE_USE_CPU=true; on GPUs, start them with torchrun, or set RANK, WORLD_SIZE and LOCAL_RANK"
        )


def _check_in_time(accelerator: Any) -> None:
    # Accelerate keeps the model itself and marks what it has put around it, if it has.
    in_ddp = any(not getattr(model, "_is_accelerate_prepared", False) for model in accelerator._models)
    if accelerator._optimizers or in_ddp:
        raise StateError(
            "this Accelerator has prepared a model or an optimizer already: call zeroopt.integrations.accelerate.enable before the "
            "first prepare(), or accelerator.free_memory() first and prepare all of them anew"
        )
