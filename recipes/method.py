"""The one place in which recipes differ between DistributedDataParallel and zeroopt: around the loop, not in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zeroopt
import zeroopt.checkpoint

METHODS = {"ddp": "DDP", "zeroopt": "zeroopt"}

SAME_BITS: dict[str, Any] = {"fused": False}
"""Options of `zeroopt.wrap`: torch's own step, by which two ranks on CPUs have DDP's very bits, step after step."""

BFLOAT16: dict[str, Any] = {"param_dtype": torch.bfloat16, "master_weights": "remainder"}
"""Likewise: parameters are bfloat16, and of those that a rank steps, 16 bits more complete each to its float32."""


def prepare(
    method: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, some_unused: bool = False, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and the optimizer, made data-parallel. Collective.

    Args:
        method: a key of `METHODS`.
        some_unused: whether a step may leave parameters without a gradient, which DDP has to be told, and zeroopt has not.
        options: of `zeroopt.wrap`.
    """
    if method == "ddp":
        return DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=some_unused
        ), optimizer
    return zeroopt.wrap(model, optimizer, **options)


def autocast(method: str, device: torch.device, *, bfloat16: bool) -> torch.autocast:
    """What computes in bfloat16 with parameters in float32, as DDP needs it. By zeroopt, parameters are bfloat16 (`param_dtype`)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and method == "ddp")


def bare(model: nn.Module) -> nn.Module:
    """The model that was given to `prepare`, to be called on one rank alone while it stays prepared."""
    assert isinstance(model, DistributedDataParallel | zeroopt.ZeroDataParallel)
    return model.module


def finish(model: nn.Module) -> nn.Module:
    """The model that was given to `prepare`, with what it has learned and nothing around it, to be prepared anew. Collective."""
    return zeroopt.unwrap(model) if isinstance(model, zeroopt.ZeroDataParallel) else bare(model)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save all that a later `resume` needs to go on, on any number of ranks. Collective.

    By DDP every rank has everything, and rank 0 writes it. By zeroopt every rank writes what it alone has.
    """
    if isinstance(model, zeroopt.ZeroDataParallel):
        assert isinstance(optimizer, zeroopt.ZeroOptimizer)
        zeroopt.checkpoint.save(folder / f"step-{step}", model, optimizer, {"step": step}, keep=2)
        return
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, folder / "new.pt")
        (folder / "new.pt").replace(folder / "newest.pt")
    dist.barrier()


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what `save` saved last; returns the step to go on with, 0 where nothing has been saved. Collective."""
    if isinstance(model, zeroopt.ZeroDataParallel):
        assert isinstance(optimizer, zeroopt.ZeroOptimizer)
        return int(zeroopt.checkpoint.resume(folder, model, optimizer).get("step", 0))
    if not (folder / "newest.pt").exists():
        return 0
    state = torch.load(folder / "newest.pt", map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
