"""The model of a checkpoint, or of a file of torch.save, as values for one on the meta device."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..building.saved import Saved
from ..errors import CheckpointError
from ..plan.regions import FlatLayout
from ..state.shard_tensor import ShardTensor
from .disk.paths import local_path
from .format.plain import load_plain
from .format.reading import Checkpoint, open_checkpoint

_MODEL = "model"  # the key under which models are saved beside optimizers


def open_saved(path: str | os.PathLike[str], model: nn.Module) -> Saved:
    """Open a checkpoint of zeroopt or DCP, or a file that torch.save has written of a state dict. Not collective.

    Args:
        model: by whose names it is told whether its values are under "model", or nothing else was saved.

    Raises:
        CheckpointError: there is none, or it cannot be opened. No code in it is run.
    """
    place = local_path(path)
    names = list(model.state_dict(keep_vars=True))
    return _SavedFile(place, names) if place.is_file() else _SavedDirectory(open_checkpoint(path), names)


class _SavedDirectory(Saved):
    """Of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, names: Collection[str]) -> None:
        self.place = f"the checkpoint {checkpoint.path}"
        self._checkpoint = checkpoint
        saved = checkpoint.metadata.state_dict_metadata
        self._prefix = _prefix(saved, names)
        self.shapes = {
            key.removeprefix(self._prefix): entry.size
            for key, entry in saved.items()
            if key.startswith(self._prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str, into: Tensor, begin: int, end: int) -> None:
        if end - begin < into.numel():
            layout = FlatLayout.of(into.shape, into.stride())
            into = ShardTensor(layout, begin, into.as_strided((into.numel(),), (1,))[begin:end])
        self._checkpoint.read({self._prefix + name: into})

    def verify(self, group: dist.ProcessGroup) -> None:
        self._checkpoint.verify(group)

    def describe(self) -> str:
        manifest = self._checkpoint.manifest
        when = "" if manifest is None else f" of {manifest.saved_at}"
        return f"checkpoint {os.path.realpath(self._checkpoint.path)}{when}"


class _SavedFile(Saved):
    """Of a file with a state dict, which is mapped, not read, when it is opened."""

    def __init__(self, path: Path, names: Collection[str]) -> None:
        self.place = str(path)
        self._path = path
        content = load_plain(path, path, mapped=True)
        inside = content.get(_MODEL) if isinstance(content, dict) else None
        state_dict = inside if isinstance(inside, dict) else content
        if not isinstance(state_dict, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, and a state dict was expected")
        self._values = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
        self.shapes = {name: value.shape for name, value in self._values.items()}

    def read(self, name: str, into: Tensor, begin: int, end: int) -> None:
        value = self._values[name]
        if end - begin == into.numel():
            into.copy_(value)
            return
        if value.stride() != into.stride():
            value = torch.empty_strided(into.shape, into.stride(), dtype=value.dtype, device="cpu").copy_(value)
        flat, values = (tensor.as_strided((into.numel(),), (1,)) for tensor in (into, value))
        flat[begin:end].copy_(values[begin:end])

    def verify(self, group: dist.ProcessGroup) -> None:
        """It was looked at when it was opened."""

    def describe(self) -> str:
        return f"file {os.path.realpath(self._path)} of {self._path.stat().st_size} bytes"


def _prefix(keys: Mapping[str, object], names: Collection[str]) -> str:
    """What keys of the model begin with: they may also be all that there is, as of a model that was saved alone."""
    below = f"{_MODEL}."
    alone = any(name in keys for name in names) and not any(below + name in keys for name in names)
    return "" if alone else below
