"""Only what can be loaded without running code is saved, and nothing else is loaded."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from zeroopt import CheckpointError
from zeroopt.checkpoint.format.plain import check_plain, load_metadata, load_plain


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
plain = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=10,
)


@given(plain)
def test_plain_values_pass_and_come_back(value: Any) -> None:
    check_plain(value, "value")
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    assert load_plain(stream, "value") == value


@pytest.mark.parametrize(
    "value",
    [
        torch.bfloat16,
        torch.Size([1, 2]),
        torch.nn.Parameter(torch.ones(2)),
        OrderedDict(a=torch.ones(2)),
        torch.device("cpu"),
    ],
    ids=str,
)
def test_so_do_those_of_torch(value: Any) -> None:
    check_plain(value, "value")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"a": [1, {"b": Fraction(1, 2)}]}, r"optimizer\['a'\]\[1\]\['b'\] is a fractions.Fraction"),
        ((1, print), r"optimizer\[1\] is a builtins.builtin_function_or_method"),
        ({"x": lambda: 1}, r"optimizer\['x'\] is a builtins.function"),
        ({Fraction(1, 2): 1}, "a key of optimizer is a fractions.Fraction"),
        ({"lr": np.float64(0.1)}, r"optimizer\['lr'\] is a numpy.float64"),
    ],
    ids=["nested", "function", "lambda", "key", "numpy"],
)
def test_what_could_not_be_loaded_is_refused_by_name(value: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        check_plain(value, "optimizer")


def test_malicious_values_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(CheckpointError, match="running code"):
        check_plain([Malicious(made)], "extra")
    torch.save({"extra": Malicious(made)}, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot load .*file"):
        load_plain(tmp_path / "file", tmp_path / "file")
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir"):
        load_metadata(pickle.dumps(Malicious(made)))
    assert not made.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_of_dcp_is_read(dtype: torch.dtype, protocol: int) -> None:
    size = torch.Size([2, 3])
    tensor = TensorStorageMetadata(TensorProperties(dtype), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)])
    index = MetadataIndex("a", torch.Size([0, 0]), 0)
    metadata = Metadata(
        {"a": tensor, "b": BytesStorageMetadata()},
        planner_data={"a": ("a",), "b": ("b", 0)},
        storage_data={index: _StorageInfo("__0_0.distcp", 0, 10)},
        storage_meta=StorageMeta(checkpoint_id=Path("/somewhere"), save_id="1"),
    )
    assert load_metadata(pickle.dumps(metadata, protocol)) == metadata


@pytest.mark.parametrize(
    "stolen", [b"ctorch\nload\n.", b"cbuiltins\neval\n.", b"ctorch.serialization\nload\n.", b"ctorch\nserialization\n."]
)
def test_nothing_else_of_torch_or_python_is_at_hand(stolen: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="no checkpoint needs"):
        load_metadata(stolen)


def test_attributes_of_allowed_classes_are_not_at_hand() -> None:
    module, name = "torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"
    stolen = (
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93."
    )
    with pytest.raises(pickle.UnpicklingError, match="no checkpoint needs"):
        load_metadata(stolen)


def test_a_pickle_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="notes something under 268435455"):
        load_metadata(b"\x80\x04}r\xff\xff\xff\x0f.")


def test_neither_is_a_pipe_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for mapped in (True, False):
        with pytest.raises(CheckpointError, match="not an ordinary file"):
            load_plain(tmp_path / "pipe", "pipe", mapped=mapped)
