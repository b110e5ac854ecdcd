"""The GPT that is adapted, as a file: written here after a short training, or by recipes.generate after a long one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load


def save_trunk(model: nn.Module, path: Path) -> None:
    """Write a model's state dict. Collective; rank 0 writes."""
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    dist.barrier()


def load_trunk(model: nn.Module, path: Path) -> None:
    """Give a model what was saved: the file of `save_trunk`, or a checkpoint of zeroopt, one of recipes.generate for instance. Not
    collective: every rank reads all of it.

    Raises:
        FileNotFoundError: there is neither.
    """
    if path.is_dir():
        load({"model": model.state_dict()}, checkpoint_id=path, no_dist=True)
    elif path.exists():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    else:
        raise FileNotFoundError(
            f"there is no trunk to adapt at {path}: train one by --part trunk, or give --trunk a checkpoint of recipes.generate"
        )
