"""Ways to save and load a model and its optimizer, each as its own users would write it."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as dcp_loader
import torch.distributed.checkpoint.state_dict_saver as dcp_saver
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import zeroopt
import zeroopt.checkpoint
from bench.steps import Wrapped, ddp, zero

Pending = Future[Any] | None
"""Of a save that goes on in the background."""


@dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
        wrap: takes a model and a learning rate.
        save: collective; writes to a path where nothing is, and has it on the disk when it returns, or when what it returns is done.
        load: collective; into a model and an optimizer that were wrapped alike and have never stepped.
    """

    wrap: Callable[[nn.Module, float], Wrapped]
    save: Callable[[Path, nn.Module, Any], Pending]
    load: Callable[[Path, nn.Module, Any], None]


def adamw(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=lr, fused=True)


def by(
    wrap: Callable[[nn.Module, torch.optim.Optimizer], Wrapped],
) -> Callable[[nn.Module, float], Wrapped]:
    return lambda net, lr: wrap(net, adamw(net, lr))


def fsdp2(net: nn.Module, lr: float) -> Wrapped:
    """Each block by itself, then the rest. In torch 2.6 and newer."""
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(net)
    return net, adamw(net, lr)


def save_zeroopt(path: Path, model: Any, optimizer: Any) -> None:
    zeroopt.checkpoint.save(path, model, optimizer)


def save_zeroopt_async(path: Path, model: Any, optimizer: Any) -> Pending:
    return zeroopt.checkpoint.async_save(path, model, optimizer)


def load_zeroopt(path: Path, model: Any, optimizer: Any) -> None:
    zeroopt.checkpoint.load(path, model, optimizer)


def save_shards(path: Path, model: Any, optimizer: Any) -> None:
    """Every rank its shard, rank 0 the model."""
    path.mkdir(exist_ok=True)
    if dist.get_rank() == 0:
        save_synced(model.state_dict(), path / "model.pt")
    save_synced(optimizer.state_dict(), path / f"optimizer-{dist.get_rank()}.pt")


def load_shards(path: Path, model: Any, optimizer: Any) -> None:
    model.load_state_dict(load_whole(path / "model.pt"))
    optimizer.load_state_dict(load_whole(path / f"optimizer-{dist.get_rank()}.pt"))


def save_consolidated(path: Path, model: Any, optimizer: Any) -> None:
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        save_synced({"model": model.state_dict(), "optimizer": optimizer.full_state_dict()}, path)


def save_ddp(path: Path, model: Any, optimizer: Any) -> None:
    if dist.get_rank() == 0:
        save_synced({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, path)


def load_by_torch(path: Path, model: Any, optimizer: Any) -> None:
    """Every rank all of it."""
    saved = load_whole(path)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


def save_synced(value: object, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def load_whole(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=False, weights_only=True)


def save_dcp(path: Path, model: Any, optimizer: Any) -> None:
    dcp_saver.save(as_dcp_has_it(model, optimizer), checkpoint_id=path)


def save_dcp_async(path: Path, model: Any, optimizer: Any) -> Pending:
    state = as_dcp_has_it(model, optimizer)
    pending = dcp_saver.async_save(state, checkpoint_id=path, process_group=background_group())
    assert isinstance(pending, Future)
    return pending


@cache
def background_group() -> dist.ProcessGroup | None:
    """For another thread's collectives."""
    group: dist.ProcessGroup | None = dist.new_group(backend="gloo")
    return group


def load_dcp(path: Path, model: Any, optimizer: Any) -> None:
    state = as_dcp_has_it(model, optimizer)
    dcp_loader.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def as_dcp_has_it(model: Any, optimizer: Any) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


METHODS = {
    "stage 2": Method(by(zero(stage=2)), save_zeroopt, load_zeroopt),
    "stage 0": Method(by(zero(stage=0)), save_zeroopt, load_zeroopt),
    "stage 2, async_save": Method(by(zero(stage=2)), save_zeroopt_async, load_zeroopt),
    "stage 2, state_dict()": Method(by(zero(stage=2)), save_shards, load_shards),
    "stage 2, full_state_dict()": Method(by(zero(stage=2)), save_consolidated, load_by_torch),
    "DDP, torch.save": Method(by(ddp), save_ddp, load_by_torch),
    "DDP, DCP": Method(by(ddp), save_dcp, load_dcp),
    "FSDP2, DCP": Method(fsdp2, save_dcp, load_dcp),
    "FSDP2, DCP async_save": Method(fsdp2, save_dcp_async, load_dcp),
}
