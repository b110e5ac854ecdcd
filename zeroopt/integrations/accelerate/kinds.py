"""Which Accelerators go with zeroopt: those set up for plain data parallelism."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import DistributedType

from ...errors import NotSupportedError, StateError

_STARTED = "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"  # how many processes torchrun or MPI has started
_SPLITS = "tp_size", "cp_size", "sp_size", "dp_shard_size"
_OTHERS = (
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
)


def check_kind(accelerator: Any) -> None:
    """Refuse an Accelerator that splits the training state otherwise, or does not know of its ranks.

    Raises:
        NotSupportedError: it was set up for DeepSpeed, FSDP, Megatron-LM, XLA or model parallelism.
        StateError: several processes were started, and it knows of one.
    """
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
