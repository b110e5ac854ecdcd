"""Readers of files. Of any bytes they make something, or raise zeroopt's own errors."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from tests.support.deepspeed_files import model_path, rank_path, write_model, write_ranks, write_universal
from tests.support.written_checkpoints import write
from zeroopt import CheckpointError
from zeroopt.checkpoint.disk.manifest import NAME, Manifest
from zeroopt.checkpoint.disk.paths import is_file_name
from zeroopt.checkpoint.exporting import export
from zeroopt.checkpoint.foreign.convert_deepspeed import from_deepspeed
from zeroopt.checkpoint.foreign.inert_pickle import load_inert
from zeroopt.checkpoint.format.plain import load_plain
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.inspection import inspect
from zeroopt.errors import ZeroOptError

METADATA, DATA = ".metadata", "__0_0.distcp"
VALUE = {"tensor": torch.arange(6.0).view(2, 3), "plain": [1, 2.0, ("three", None), b"4"], "set": {5}}
GROUPS = [{"weight": torch.arange(6.0).view(2, 3)}, {"bias": torch.arange(2.0)}]


def content_of(write_into: Callable[[Path], Any], name: str) -> bytes:
    """A file of what is written into a new folder."""
    with TemporaryDirectory() as folder:
        write_into(Path(folder))
        return (Path(folder) / name).read_bytes()


def torch_files() -> list[bytes]:
    """What torch.save writes, as an archive and as it did before there were archives, and a pickle of no tensors."""
    files = [io.BytesIO(), io.BytesIO()]
    for file, is_zip in zip(files, (True, False), strict=True):
        torch.save(VALUE, file, _use_new_zipfile_serialization=is_zip)
    return [*(file.getvalue() for file in files), pickle.dumps({"a": [1, "b", 2.5]}, protocol=2)]


def read_torch_file(data: bytes) -> None:
    """As a file of our own checkpoints, and as one of somebody else's."""
    with suppress(CheckpointError):
        load_plain(io.BytesIO(data), "value")
    with TemporaryDirectory() as folder, suppress(ZeroOptError):
        path = Path(folder) / "file"
        path.write_bytes(data)
        load_inert(path)


@cache
def checkpoint() -> dict[str, bytes]:
    """The files of a small checkpoint, by name."""
    with TemporaryDirectory() as folder:
        write(Path(folder) / "a", 1)
        return {path.name: path.read_bytes() for path in (Path(folder) / "a").iterdir()}


def read_checkpoint_with(name: str) -> Callable[[bytes], None]:
    """A reader of a checkpoint without checksums, of which one file is the input."""

    def read(data: bytes) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "a"
            path.mkdir()
            for other, content in {**checkpoint(), name: data}.items():
                if other != NAME:
                    (path / other).write_bytes(content)
            inspect(path).as_json()
            with suppress(CheckpointError):
                export(open_checkpoint(path), Path(folder) / "torch.pt")

    return read


def read_manifest(data: bytes) -> None:
    """With the checksum that belongs to it, where it is JSON."""
    with suppress(ValueError, RecursionError):
        content = json.loads(data)
        if isinstance(content, dict):
            content.pop("crc32", None)
            content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
            data = json.dumps(content).encode()
    with TemporaryDirectory() as folder:
        (Path(folder) / NAME).write_bytes(data)
        with suppress(CheckpointError):
            assert all(map(is_file_name, Manifest.read(Path(folder)).files))


def _write_deepspeed(folder: Path) -> None:
    write_model(folder, GROUPS)
    write_ranks(folder, GROUPS, 2)


@cache
def _deepspeed() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        _write_deepspeed(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


DEEPSPEED_MODEL, DEEPSPEED_RANK = model_path(Path()).name, rank_path(Path(), 1).name
UNIVERSAL_STATE = "zero/weight/exp_avg.pt"


def _convert(folder: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    with suppress(ZeroOptError):
        from_deepspeed(folder, model, optimizer)


def convert_deepspeed_with(name: str) -> Callable[[bytes], None]:
    """A conversion of DeepSpeed's files, of which one is the input."""

    def convert(data: bytes) -> None:
        with TemporaryDirectory() as folder:
            for other, content in {**_deepspeed(), name: data}.items():
                (Path(folder) / other).write_bytes(content)
            _convert(Path(folder))

    return convert


def deepspeed_files(name: str) -> list[bytes]:
    """That file as DeepSpeed writes it."""
    return [_deepspeed()[name]]


@cache
def _universal() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory()
    write_universal(Path(folder.name), GROUPS)
    return folder


def convert_universal(data: bytes) -> None:
    """A universal checkpoint, whose state of one parameter is the input."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        shutil.copytree(_universal().name, path)
        (path / UNIVERSAL_STATE).write_bytes(data)
        _convert(path)


def universal_files() -> list[bytes]:
    """The state of a parameter, as it is written."""
    return [(Path(_universal().name) / UNIVERSAL_STATE).read_bytes()]
