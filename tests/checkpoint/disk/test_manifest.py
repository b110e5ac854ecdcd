"""What a manifest says comes back, or it is refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zeroopt
from zeroopt import CheckpointError
from zeroopt.checkpoint.disk.files import CheckedFiles, FileRecord
from zeroopt.checkpoint.disk.manifest import NAME, Manifest, as_json

facts = st.dictionaries(
    st.text(),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists),
)
records = st.builds(FileRecord, st.integers(0, 1 << 60), st.integers(0, (1 << 32) - 1))


@given(facts, st.dictionaries(st.text(), records), st.integers(0, 1 << 62), st.integers(0, 1 << 62))
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
