"""Whatever is in files, readers say by their own errors what is wrong with it, in the memory that it takes itself."""

from __future__ import annotations

import io
import json
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_files import model_path, rank_path, write_model, write_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from written_checkpoints import write

from zeroopt import CheckpointError, StateError
from zeroopt.checkpoint.disk.manifest import NAME, Manifest
from zeroopt.checkpoint.exporting import export
from zeroopt.checkpoint.foreign.convert_deepspeed import from_deepspeed
from zeroopt.checkpoint.foreign.convert_zero_redundancy import from_zero_redundancy
from zeroopt.checkpoint.foreign.inert_pickle import load_inert
from zeroopt.checkpoint.format.plain import load_metadata, load_plain
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.inspection import inspect
from zeroopt.errors import ZeroOptError

_MORE_BYTES = 16 << 20

OPERATIONS = [operation.to_bytes(1, "little") for operation in b"()]}.Kjhqr\x85\x86\x87\x94\x81Rbtusea0"]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """With some bytes changed, inserted, left out, or there twice."""
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, len(content)))
        last = min(first + draw(st.integers(0, 12)), len(content))
        inserted = draw(
            st.binary(max_size=6)
            | st.lists(st.sampled_from(OPERATIONS), max_size=6).map(b"".join)
            | st.sampled_from([content[first : last + 20], (1 << 28).to_bytes(4, "little")])
        )
        content = content[:first] + inserted + content[last:]
    return content


@contextmanager
def in_little_memory(size: int) -> Iterator[None]:
    """Fails where Python takes more memory than 200 bytes for each one of a file, and 16 MB."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 200 * size + _MORE_BYTES
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoints") / "a"
    write(path, 1)
    return (path / ".metadata").read_bytes()


@given(data=st.data())
def test_metadata(data: st.DataObject, metadata: bytes) -> None:
    content = data.draw(damaged(metadata))
    with in_little_memory(len(content)), suppress(Exception):
        load_metadata(content)


VALUE = {"tensor": torch.arange(6.0).view(2, 3), "plain": [1, 2.0, ("three", None), b"4"], "set": {5}}


@pytest.mark.parametrize("is_zip", [True, False])
@given(st.data())
def test_files_of_torch(is_zip: bool, data: st.DataObject) -> None:
    file = io.BytesIO()
    torch.save(VALUE, file, _use_new_zipfile_serialization=is_zip)
    content = data.draw(damaged(file.getvalue()))
    with in_little_memory(len(content)), suppress(CheckpointError):
        load_plain(io.BytesIO(content), "value")
    with tempfile.TemporaryDirectory() as directory, in_little_memory(len(content)), suppress(ZeroOptError):
        path = Path(directory) / "file"
        path.write_bytes(content)
        load_inert(path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@given(st.data())
def test_a_checkpoint_without_checksums(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a"
        write(path, 1)
        (path / NAME).unlink()
        (path / name).write_bytes(data.draw(damaged((path / name).read_bytes())))
        inspect(path).as_json()
        with suppress(CheckpointError):
            export(open_checkpoint(path), Path(directory) / "torch.pt")


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@st.composite
def replaced(draw: st.DrawFn, whole: Any, others: st.SearchStrategy[Any]) -> Any:
    """With one value in it another one, or missing."""
    if not isinstance(whole, (dict, list)) or not whole or draw(st.integers(0, 4)) == 0:
        return draw(others)
    parts = dict(whole) if isinstance(whole, dict) else dict(enumerate(whole))
    key = draw(st.sampled_from(list(parts)))
    if draw(st.integers(0, 9)) == 0:
        del parts[key]
    else:
        parts[key] = draw(replaced(parts[key], others))
    return parts if isinstance(whole, dict) else list(parts.values())


@given(st.data())
def test_a_manifest(data: st.DataObject) -> None:
    content: Any = {"format": 1, "zeroopt": "1", "torch": "2", "number": 1, "saved_at": 1, "facts": {"runs": ["a"]}}
    content = data.draw(replaced({**content, "files": {"a": {"bytes": 1, "crc32": 2}}}, values))
    if isinstance(content, dict):
        content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / NAME).write_text(json.dumps(content))
        with suppress(CheckpointError):
            assert set(Manifest.read(Path(directory)).files) <= {"a", *Manifest.read(Path(directory)).files}


GROUPS = [{"weight": torch.arange(6.0).view(2, 3)}, {"bias": torch.arange(2.0)}]
odd_values = values | st.builds(lambda: torch.ones(3)) | st.builds(lambda: torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("of_model", [True, False])
@given(st.data())
def test_files_of_deepspeed(of_model: bool, data: st.DataObject) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_model(folder, GROUPS)
        write_ranks(folder, GROUPS, 2)
        path = model_path(folder) if of_model else rank_path(folder, 1)
        torch.save(data.draw(replaced(load_inert(path), odd_values)), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        with suppress(ZeroOptError):
            from_deepspeed(folder, model, optimizer)


def zero_redundancy() -> tuple[Any, Any]:
    """What a ZeroRedundancyOptimizer has saved: all of it on one rank, and what each of two ranks has."""
    entries = [{"step": torch.tensor(2.0), "exp_avg": torch.ones(shape)} for shape in ((2, 3), (2,))]
    groups = [{"lr": 0.1, "params": [0]}, {"lr": 0.1, "params": [1]}]
    whole = {"state": dict(enumerate(entries)), "param_groups": groups}
    ranks = [
        {
            "state": {0: entry},
            "param_groups": [{**group, "params": [0][: number == rank]} for number, group in enumerate(groups)],
        }
        for rank, entry in enumerate(entries)
    ]
    return whole, ranks


@given(st.data())
def test_state_dicts_of_zero_redundancy(data: st.DataObject) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    for saved in zero_redundancy():
        from_zero_redundancy(saved, optimizer)
        with suppress(StateError):
            from_zero_redundancy(data.draw(replaced(saved, odd_values)), optimizer)
