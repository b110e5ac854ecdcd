"""Small checkpoints for tests, and the values that have to be in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.format.writing import write_checkpoint
from zeroopt.plan.regions import FlatLayout
from zeroopt.state.shard_tensor import ShardTensor

SHAPE = (5, 7)


def whole(version: int) -> Tensor:
    """The tensor that the ranks share in this version of the checkpoint."""
    return torch.arange(35.0).reshape(SHAPE) + 100 * version


def shard(tensor: Tensor, start: int, stop: int) -> ShardTensor:
    """The elements [start, stop) of a tensor without gaps, in memory of their own."""
    layout = FlatLayout.of(tensor.shape, tensor.stride())
    in_memory = tensor.permute(layout.dims).reshape(-1)
    return ShardTensor(layout, start, in_memory[start:stop].clone())


def even_shard(tensor: Tensor, rank: int, size: int) -> ShardTensor:
    """A rank's share of a tensor."""
    return shard(tensor, tensor.numel() * rank // size, tensor.numel() * (rank + 1) // size)


def entries(version: int, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """What a rank gives to a checkpoint."""
    return {
        "model": {"weight": even_shard(whole(version), rank, size)},
        "optimizer": {
            "state": {
                "weight": {"exp_avg": even_shard(-whole(version), rank, size), "step": torch.tensor(float(version))}
            },
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["weight"]}],
        },
    }


def write(
    path: Path, version: int, group: dist.ProcessGroup | None = None, *, runs: Sequence[str] = (), **options: Any
) -> None:
    """Write that version, as the last of these runs, if any."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    facts = {"version": version} | ({"runs": list(runs)} if runs else {})
    side = {f"rank{rank}.pt": {"noise": torch.full((3,), float(version)), "rank": rank}}
    write_checkpoint(path, entries(version, rank, size), facts, side, group, **options)


def version_of(path: Path) -> int:
    """Which version a checkpoint is; fails unless all of it is of that one."""
    checkpoint = open_checkpoint(path)
    checkpoint.verify(None)
    assert checkpoint.facts is not None
    version: int = checkpoint.facts["version"]
    targets = {
        "model.weight": torch.empty(SHAPE),
        "optimizer.state.weight.exp_avg": torch.empty(SHAPE),
        "optimizer.state.weight.step": torch.empty(()),
    }
    values = checkpoint.read({**targets, "optimizer.param_groups.0.betas": None})
    assert values == {"optimizer.param_groups.0.betas": (0.9, 0.99)}
    assert torch.equal(targets["model.weight"], whole(version))
    assert torch.equal(targets["optimizer.state.weight.exp_avg"], -whole(version))
    assert targets["optimizer.state.weight.step"] == version
    names = [name for name in checkpoint.files if name.endswith(".pt")]
    assert names
    for name in names:
        assert torch.equal(checkpoint.side_file(name)["noise"], torch.full((3,), float(version)))
    return version
