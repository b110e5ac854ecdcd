"""torch's FSDP, first and second version, with parameters that stay gathered from forward to backward: what ZeRO-2 is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.compare import formula
from bench.compare.methods.method import Method, Training, adamw
from bench.compare.setting import Setting


def prepare_first(net: nn.Module, setting: Setting) -> Training:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    options: dict[str, Any] = {}
    if setting.precision == "bfloat16":
        options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = FullyShardedDataParallel(
        net,
        device_mesh=init_device_mesh(setting.device, (dist.get_world_size(),)),
        sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
        auto_wrap_policy=ModuleWrapPolicy(blocks_of(net)),
        device_id=next(net.parameters()).device,  # on CPU too, where it would look for an accelerator
        use_orig_params=True,
        **options,
    )
    return Training(model, adamw(model, setting, fused=True), model.no_sync)


def prepare_second(net: nn.Module, setting: Setting) -> Training:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": init_device_mesh(setting.device, (dist.get_world_size(),)),
        "reshard_after_forward": False,
    }
    if setting.precision == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kinds = tuple(blocks_of(net))
    for module in net.modules():
        if isinstance(module, kinds):
            fully_shard(module, **options)
    model: Any = fully_shard(net, **options)

    @contextmanager
    def unsynchronised() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return Training(model, adamw(model, setting, fused=True), unsynchronised)


def blocks_of(net: nn.Module) -> set[type[nn.Module]]:
    """The layers of a GPT, each of which communicates as one."""
    blocks: Any = net.blocks
    return {type(block) for block in blocks}


def needs_new_torch(setting: Setting) -> str | None:
    import torch.distributed.fsdp

    return None if hasattr(torch.distributed.fsdp, "fully_shard") else "needs torch 2.6 or newer"


METHODS = (
    Method("FSDP1, SHARD_GRAD_OP", prepare_first, formula.fsdp),
    Method("FSDP2, reshard_after_forward=False", prepare_second, formula.fsdp, obstacle=needs_new_torch),
)
