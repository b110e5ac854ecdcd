"""What may be in a checkpoint: values that torch.load(weights_only=True) gives back, and metadata made of DCP's own classes."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...state.shard_tensor import ShardTensor
from ..disk.files import open_ordinary
from ..disk.pickle_bounds import check_pickle
from ..disk.torch_file_bounds import check_torch_file

_PLAIN = {type(None), bool, int, float, str, Tensor, nn.Parameter, ShardTensor, torch.dtype, torch.Size}


def check_plain(value: Any, name: str) -> None:
    """Raise CheckpointError, with the name of the entry, for what torch.load(weights_only=True) would refuse to load."""
    if type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            check_plain(key, f"a key of {name}")
            check_plain(entry, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            check_plain(entry, f"{name}[{index}]")
    else:
        _check_loadable(value, name)


def _check_loadable(value: Any, name: str) -> None:
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which could only be loaded by running code out "
            "of the checkpoint. Save plain containers, numbers, strings and tensors instead"
        ) from error


_CLASSES: Mapping[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    # where TensorProperties was before torch 2.4
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


def load_metadata(content: bytes) -> Any:
    """What is in DCP's `.metadata`, in memory as long as it is, about. Runs no code of it.

    Raises:
        Exception: of any kind, UnpicklingError where something is not in it by right.
    """
    for _ in check_pickle(io.BytesIO(content)):
        pass
    return _MetadataUnpickler(io.BytesIO(content)).load()


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses whatever is not in DCP's `.metadata` by right. Raises UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs and could run code")
        if module == "pathlib._local":
            module = "pathlib"
        return super().find_class(module, name)


def load_plain(stream: IO[bytes] | Path, name: str | Path, *, mapped: bool = False) -> Any:
    """torch.load(weights_only=True), to the CPU, of a file or stream that takes no more memory than it is long. Raises CheckpointError.

    Args:
        mapped: tensors are the file's pages, which are read when they are needed; then `stream` has to be a path.
    """
    try:
        with _opened(stream) as file:
            return torch.load(stream if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise CheckpointError(f"cannot load {name}: {error}") from error


def check_file(stream: IO[bytes] | Path, name: str | Path) -> None:
    """Raise CheckpointError where a file or stream, which somebody else is to load, is no whole file of torch.save, or would take more
    memory than it is long. Afterwards a stream is at its beginning."""
    try:
        with _opened(stream):
            pass
    except Exception as error:
        raise CheckpointError(f"cannot load {name}: {error}") from error


@contextmanager
def _opened(stream: IO[bytes] | Path) -> Iterator[IO[bytes]]:
    """A file of torch.save that has been looked through, at its beginning. Raises what `open_ordinary` and `check_torch_file` do."""
    with open_ordinary(stream) if isinstance(stream, Path) else nullcontext(stream) as file:
        for _ in check_torch_file(file):
            pass
        file.seek(0)
        yield file
