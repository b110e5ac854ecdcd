"""Parts that an extension of DCP has compressed are read, and are looked through as all others are."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from zeroopt import CheckpointError
from zeroopt.checkpoint.format.reading import open_checkpoint

extension = pytest.importorskip("torch.distributed.checkpoint._extension", reason="this torch has no extensions")


class Deflated(extension.StreamTransformExtension):
    """Compresses by zlib, in one piece; or writes, in the place of each part, something else."""

    instead: bytes | None = None

    @staticmethod
    def registry_name() -> str:
        return "stream.deflated"

    @staticmethod
    def from_descriptor(version: str) -> Deflated:
        return Deflated()

    def get_descriptor(self) -> str:
        return "stream.deflated/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return _Deflating(output, self.instead)

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(zlib.decompress(input.read()))


class _Deflating(io.BytesIO):
    """Collects a part, and passes it on when it is flushed for the last time."""

    def __init__(self, output: IO[bytes], instead: bytes | None) -> None:
        super().__init__()
        self._output, self._instead = output, instead

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue() if self._instead is None else self._instead
            self._output.write(zlib.compress(content))
            super().close()


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    made = extension.ExtensionRegistry.__init__

    def with_ours(registry: Any) -> None:
        made(registry)
        registry.register(Deflated)

    monkeypatch.setattr(extension.ExtensionRegistry, "__init__", with_ours)


ENTRIES: dict[str, Any] = {"weight": torch.arange(6.0).view(2, 3), "zeros": torch.zeros(1 << 16), "note": {"epoch": 3}}


def write(path: Path, instead: bytes | None = None) -> None:
    extension = Deflated()
    extension.instead = instead
    dcp.save(ENTRIES, storage_writer=FileSystemWriter(path, _extensions=[extension]), no_dist=True)


def read(path: Path) -> dict[str, Any]:
    found = open_checkpoint(path)
    wanted = {
        key: torch.empty_like(ENTRIES[key]) if found.is_tensor(key) else None
        for key in found.metadata.state_dict_metadata
    }
    return {**wanted, **found.read(wanted)}


def test_what_was_compressed_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    values = read(tmp_path)
    assert values["note.epoch"] == 3
    assert all(torch.equal(values[key], ENTRIES[key]) for key in ("weight", "zeros"))


def compressed_once_more() -> bytes:
    """A file of torch.save whose parts are compressed in themselves."""
    stored, deflated = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2, 3), stored)
    with zipfile.ZipFile(stored) as archive, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as again:
        for member in archive.infolist():
            again.writestr(member.filename, archive.read(member))
    return deflated.getvalue()


@pytest.mark.parametrize(
    ("instead", "complaint"),
    [(compressed_once_more(), "is compressed, which torch.save does not do"), (bytes(3 << 20), "becomes longer than")],
    ids=["compressed twice", "too long"],
)
def test_what_it_becomes_is_looked_through(tmp_path: Path, instead: bytes, complaint: str) -> None:
    write(tmp_path, instead)
    with pytest.raises(CheckpointError, match=complaint):
        read(tmp_path)
