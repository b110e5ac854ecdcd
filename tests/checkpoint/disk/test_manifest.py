"""What a manifest says comes back, or it is refused."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zeroopt
from zeroopt import CheckpointError
from zeroopt.checkpoint.disk import manifest
from zeroopt.checkpoint.disk.files import CheckedFiles, FileRecord
from zeroopt.checkpoint.disk.manifest import NAME, Manifest, as_json
from zeroopt.checkpoint.disk.paths import is_file_name

facts = st.dictionaries(
    st.text(),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists),
)
records = st.builds(FileRecord, st.integers(0, 1 << 60), st.integers(0, (1 << 32) - 1))


names = st.text().filter(is_file_name).filter(lambda name: name != NAME)


@given(facts, st.dictionaries(names, records), st.integers(0, 1 << 62), st.integers(0, 1 << 62))
def test_it_comes_back(facts: dict[str, Any], files: dict[str, FileRecord], number: int, saved_at: int) -> None:
    made = Manifest.of(facts, files, number, saved_at)
    assert (made.zeroopt, made.torch) == (zeroopt.__version__, torch.__version__)
    with tempfile.TemporaryDirectory() as directory:
        made.write(Path(directory), CheckedFiles())
        assert Manifest.read(Path(directory)) == made


def test_facts_are_json() -> None:
    assert as_json({"a": (1, 2), 3: None}) == {"a": [1, 2], "3": None}
    with pytest.raises(CheckpointError, match="plain JSON: Object of type"):
        as_json({"a": torch.ones(1)})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "{", '{"format": 1, "crc32": 0}', "\x00" * 100, "[" * 100_000]
)
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CheckpointError, match="zeroopt.json is damaged"):
        Manifest.read(tmp_path)


def test_changed_facts_are_noticed(tmp_path: Path) -> None:
    Manifest.of({"stage": 2}, {}, 1, 1).write(tmp_path, CheckedFiles())
    content = json.loads((tmp_path / NAME).read_text())
    content["facts"]["stage"] = 1
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="checksum is wrong"):
        Manifest.read(tmp_path)


def test_none_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Manifest.read(tmp_path)


def write_content(directory: Path, **changed: Any) -> None:
    """A manifest with other content, and the checksum of that."""
    Manifest.of({}, {"a": FileRecord(1, 2)}, 1, 1).write(directory, CheckedFiles())
    content = json.loads((directory / NAME).read_text())
    del content["crc32"]
    content |= changed
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (directory / NAME).write_text(json.dumps({**content, "crc32": crc32}))


@pytest.mark.parametrize(
    "changed",
    [
        *({"files": {name: {"bytes": 1, "crc32": 2}}} for name in ("../secret", "/etc/passwd", "..", "a/b", "", NAME)),
        *({"files": {"a": record}} for record in (7, {}, {"bytes": "1", "crc32": 2}, {"bytes": -1, "crc32": 2})),
        {"files": {"a": {"bytes": True, "crc32": 2}}},
        {"files": ["a"]},
        {"facts": [1]},
        {"facts": {"runs": 7}},
        {"facts": {"runs": [7]}},
        {"saved_at": float("inf")},
        {"saved_at": 10**30},
        {"saved_at": "now"},
        {"number": -1},
        {"number": 1.5},
        {"zeroopt": 3},
        {"torch": None},
    ],
    ids=str,
)
def test_what_leads_elsewhere_or_is_of_another_kind_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    write_content(tmp_path)
    assert Manifest.read(tmp_path).files == {"a": FileRecord(1, 2)}
    (tmp_path / NAME).unlink()
    write_content(tmp_path, **changed)
    with pytest.raises(CheckpointError, match=r"zeroopt\.json is damaged"):
        Manifest.read(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(CheckpointError, match="not an ordinary file"):
        Manifest.read(tmp_path)


def test_one_that_is_too_long_is_neither_written_nor_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_MOST_BYTES", 1000)
    with pytest.raises(CheckpointError, match="1000 are read again: it has too many facts"):
        Manifest.of({"text": "a" * 1000}, {}, 1, 1).write(tmp_path, CheckedFiles())
    (tmp_path / NAME).write_text(" " * 1001)
    with pytest.raises(CheckpointError, match="longer than 1000 bytes"):
        Manifest.read(tmp_path)
