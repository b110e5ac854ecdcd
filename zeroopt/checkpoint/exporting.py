"""A checkpoint as one file of torch.save, for plain torch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..errors import CheckpointError
from .disk.files import sync_directory
from .disk.paths import local_path
from .disk.torch_file import write_torch_file
from .format.reading import Checkpoint


def export(checkpoint: Checkpoint, to: str | os.PathLike[str]) -> None:
    """Write the whole of a checkpoint into one file, for torch.load(weights_only=True).

    It holds a dict: "model", "optimizer" and what else the checkpoint has. The optimizer's part is what the load_state_dict of
    torch's optimizers takes: parameters by number. One tensor is in memory at a time, and what is read of it. Not collective.

    Raises:
        CheckpointError: the checkpoint is damaged, the file exists, or it cannot be written. Nothing is left of it then.
    """
    target = Path(os.path.realpath(local_path(to)))
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already. Choose another name, or remove it")
    if target.parent == checkpoint.path.resolve():
        raise CheckpointError(
            f"{target} would be in the checkpoint, where no other files may be. Choose another directory"
        )
    checkpoint.verify(None)
    try:
        _write(checkpoint, target)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    except Exception as error:  # what values that fit nowhere make torch and pickle do
        raise CheckpointError(
            f"{checkpoint.path} cannot be one file of torch.save ({type(error).__name__}: {error})"
        ) from error


def _write(checkpoint: Checkpoint, target: Path) -> None:
    keys: dict[int, str] = {}
    content = _skeleton(checkpoint, keys)

    def fill(tensor: Tensor) -> Tensor:
        filled = torch.empty_like(tensor)
        checkpoint.read({keys[id(tensor)]: filled})
        return filled

    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with aside.open("xb") as file:
            write_torch_file(file, content, fill)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(target)
        sync_directory(target.parent)
    finally:
        aside.unlink(missing_ok=True)


def _skeleton(checkpoint: Checkpoint, keys: dict[int, str]) -> dict[str, Any]:
    """All values in their dicts and lists, with empty tensors, whose flat keys are noted by their ids."""
    entries = checkpoint.metadata.state_dict_metadata
    flat = checkpoint.read({key: None for key in entries if not checkpoint.is_tensor(key)})
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
            keys[id(flat[key])] = key
    paths = checkpoint.metadata.planner_data or {}
    nested = unflatten_state_dict(flat, {key: paths.get(key, (key,)) for key in flat})
    if isinstance(nested.get("optimizer"), dict):
        nested["optimizer"] = by_number(nested["optimizer"])
    return nested


def by_number(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with parameters by number, in the order of the param_groups, as torch's optimizers have it.

    Raises:
        CheckpointError: the param_groups do not name all parameters.
    """
    groups, states = (optimizer.get(name, default) for name, default in (("param_groups", None), ("state", {})))
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise CheckpointError("the optimizer has no param_groups that name its parameters, so these have no order")
    names = [name for group in groups for name in group["params"]]
    if not (isinstance(states, dict) and all(isinstance(name, (str, int)) for name in (*names, *states))):
        raise CheckpointError("the optimizer's state is not that of parameters by name or number")
    numbers = {name: number for number, name in enumerate(names)}
    if unknown := sorted(states.keys() - numbers.keys(), key=str):
        raise CheckpointError(f"there is optimizer state of {unknown[0]!r}, which is in none of the param_groups")
    return {
        "state": {numbers[name]: states[name] for name in names if name in states},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }
