"""Files that are checksummed while they are written."""

from __future__ import annotations

import io
import os
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroopt import CheckpointError
from zeroopt.checkpoint.disk.files import CheckedFiles, FilePart, FileRecord, read_ordinary


@given(st.lists(st.binary(max_size=50)))
def test_records_are_those_of_the_bytes_on_the_disk(pieces: list[bytes]) -> None:
    files = CheckedFiles()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a"
        with files.create_stream(path, "wb") as stream:
            for number, piece in enumerate(pieces):
                assert stream.tell() == sum(map(len, pieces[:number]))
                stream.write(memoryview(piece))
        content = b"".join(pieces)
        assert path.read_bytes() == content
        assert files.records == {"a": FileRecord(len(content), zlib.crc32(content))} == {"a": FileRecord.of(path)}


def test_what_torch_saves_is_recorded(tmp_path: Path) -> None:
    files = CheckedFiles()
    tensor = torch.randn(100_003)
    with files.create_stream(tmp_path / "a.tmp", "wb") as stream:
        torch.save(tensor, stream)
    files.rename(tmp_path / "a.tmp", tmp_path / "a")
    assert files.records == {"a": FileRecord.of(tmp_path / "a")}
    assert torch.equal(torch.load(tmp_path / "a", weights_only=True), tensor)


def test_files_are_synced_after_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with CheckedFiles().create_stream(tmp_path / "a", "wb") as stream:
        stream.write(b"12345")
    assert synced == [5]


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="cannot write .*a: File exists"),
        CheckedFiles().create_stream(tmp_path / "a", "wb"),
    ):
        pass
    assert (tmp_path / "a").read_text() == "mine"


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save writes from C++, through which no exception passes."""
    files = CheckedFiles()
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: open("/dev/full", "wb"))  # noqa: SIM115
    with (
        pytest.raises(CheckpointError, match="cannot write .*/a: No space left on device"),
        files.create_stream(tmp_path / "a", "wb") as stream,
    ):
        torch.save(torch.randn(1_000_000), stream)
    assert files.records == {}


def test_only_ordinary_files_are_read(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for, and zeros come for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not an ordinary file"):
            FileRecord.of(path)
    (tmp_path / "a").write_bytes(b"1234")
    assert read_ordinary(tmp_path / "a", 4) == b"1234"
    with pytest.raises(OSError, match="longer than 3 bytes"):
        read_ordinary(tmp_path / "a", 3)


@given(st.binary(max_size=20), st.integers(0, 25), st.integers(0, 25), st.integers(0, 30), st.integers(-1, 30))
def test_a_part_is_a_file(content: bytes, begin: int, size: int, position: int, count: int) -> None:
    part = FilePart(io.BytesIO(content), begin, size)
    alone = io.BytesIO(content[begin : begin + size].ljust(0))
    assert part.seek(position) == alone.seek(position)
    assert part.read(count) == alone.read(count)
    if begin + size <= len(content) and position <= size:
        assert part.seek(-position, os.SEEK_END) == alone.seek(-position, os.SEEK_END)
        assert part.read() == alone.read()
    with pytest.raises(OSError, match="Invalid argument"):
        part.seek(-1)
