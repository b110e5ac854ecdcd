"""Readers of files. Of any bytes they make something, or raise zeroopt's own errors."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tests.fuzz.draws import Draws
from tests.support.deepspeed_files import model_path, rank_path, write_model, write_ranks, write_universal
from tests.support.written_checkpoints import write
from zeroopt import CheckpointError
from zeroopt.checkpoint.disk.manifest import NAME, Manifest
from zeroopt.checkpoint.disk.paths import is_file_name
from zeroopt.checkpoint.exporting import export
from zeroopt.checkpoint.foreign.convert_deepspeed import from_deepspeed
from zeroopt.checkpoint.foreign.convert_zero_redundancy import from_zero_redundancy
from zeroopt.checkpoint.foreign.inert_pickle import load_inert
from zeroopt.checkpoint.format.plain import load_metadata, load_plain
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.format.transformed import CheckedTransforms
from zeroopt.checkpoint.inspection import inspect
from zeroopt.checkpoint.saved_model import open_saved
from zeroopt.errors import ZeroOptError

MOST_TRANSFORMED = 3 << 20  # of parts of a small checkpoint: what each may become, and a piece more
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


class _Pieces(io.RawIOBase):
    """What an extension of DCP gives: as many bytes as it likes, at most as many as it is asked for."""

    def __init__(self, content: bytes, longest: int) -> None:
        super().__init__()
        self._content, self._longest, self.given = content, longest, 0

    def read(self, size: int = -1) -> bytes:
        """At most so many, and all of them where there is no number."""
        end = len(self._content) if size < 0 else self.given + min(size, self._longest)
        piece = self._content[self.given : end]
        self.given += len(piece)
        return piece


@cache
def _transformed() -> tuple[Metadata, list[MetadataIndex]]:
    """Metadata, and where they have a tensor and a plain value."""
    metadata = load_metadata(checkpoint()[METADATA])
    by_name = {index.fqn: index for index in metadata.storage_data}
    return metadata, [by_name[name] for name in ("model.weight", "optimizer.param_groups.0.betas")]


def read_transformed(data: bytes) -> None:
    """A part that an extension of DCP makes of a small file: of a tensor or of a plain value, in small or large pieces."""
    draws = Draws(data)
    metadata, places = _transformed()
    index, length = draws.one_of(places), draws.one_of((1 << 16, 7000, 300))
    made = _Pieces(data[3:] * draws.one_of((1, 1, 1, 1 << 10)), length)
    extension = SimpleNamespace(transform_load_stream=lambda *_: made)
    item = SimpleNamespace(storage_index=index)
    with suppress(CheckpointError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError):
        part = CheckedTransforms(extension, metadata).transform_load_stream(item, ["stream.any/1"], io.BytesIO())
        assert made.given == len(part.getvalue()), "it was cut off"
        load_plain(part, index.fqn)
    assert made.given <= MOST_TRANSFORMED, "more was read than it may become"


def transformed_files() -> list[bytes]:
    """A part of each kind, behind the bytes that say what it is taken for."""
    return [
        bytes([kind, length, times]) + file
        for kind, length, times in ((0, 0, 0), (1, 2, 0), (0, 0, 3))
        for file in torch_files()
    ]


def read_saved_model(data: bytes) -> None:
    """A file of a state dict, for a model on the meta device: looked at when it is opened, and read where shapes fit."""
    model = nn.Linear(3, 2, device="meta")
    with TemporaryDirectory() as folder, suppress(CheckpointError):
        path = Path(folder) / "file"
        path.write_bytes(data)
        saved = open_saved(path, model)
        saved.describe()
        for name, param in model.named_parameters():
            if saved.shapes.get(name) == param.shape:
                saved.read(name, torch.zeros(param.shape), 0, param.numel())
                saved.read(name, torch.zeros(param.shape), 1, param.numel())


def saved_models() -> list[bytes]:
    """State dicts of that model, plain and under "model", and beside other things."""
    files = []
    weight = torch.arange(6.0).view(2, 3)
    for content in (
        {"weight": weight, "bias": torch.arange(2.0)},
        {"model": {"weight": weight.T.contiguous().T, "bias": torch.arange(2, dtype=torch.bfloat16)}, "epoch": 3},
        [weight],
    ):
        file = io.BytesIO()
        torch.save(content, file)
        files.append(file.getvalue())
    return files


def convert_zero_redundancy(data: bytes) -> None:
    """A state dict of a ZeroRedundancyOptimizer, as who has read it by torch.load(weights_only=True) passes it on."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    with suppress(CheckpointError):
        saved = load_plain(io.BytesIO(data), "state dict")
        with suppress(ZeroOptError):
            from_zero_redundancy(saved, optimizer)


def zero_redundancy_files() -> list[bytes]:
    """Of two ranks, and of one to which all was consolidated."""

    def entry(*shape: int) -> dict[str, Any]:
        return {"step": torch.tensor(2.0), "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}

    def groups(*counts: int) -> list[dict[str, Any]]:
        first = [0, counts[0]]
        return [
            {"lr": 0.1, "betas": (0.9, 0.99), "params": list(range(begin, begin + count))}
            for begin, count in zip(first, counts, strict=True)
        ]

    whole = {"state": {0: entry(2, 3), 1: entry(2)}, "param_groups": groups(1, 1)}
    ranks = [
        {"state": {0: entry(2, 3)}, "param_groups": groups(1, 0)},
        {"state": {0: entry(2)}, "param_groups": groups(0, 1)},
    ]
    files = [io.BytesIO(), io.BytesIO()]
    for file, content in zip(files, (whole, ranks), strict=True):
        torch.save(content, file)
    return [file.getvalue() for file in files]


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
