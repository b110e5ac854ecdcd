"""Files that torch.load takes for those of torch.save."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroopt.checkpoint.disk.torch_file import write_torch_file

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


def random(tensor: Tensor) -> Tensor:
    """Values that any dtype can have."""
    return torch.randint(0, 2, tensor.shape, dtype=torch.uint8).to(tensor.dtype)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=5), st.text())
def test_torch_loads_what_was_written(kinds: list[tuple[torch.dtype, list[int]]], name: str) -> None:
    tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in kinds]
    value = {"tensors": tensors, name: {"nested": (1, 2.5, None), 3: torch.Size([1])}}
    filled: dict[int, Tensor] = {}

    def fill(tensor: Tensor) -> Tensor:
        assert id(tensor) not in filled
        return filled.setdefault(id(tensor), random(tensor))

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "torch.pt"
        with path.open("wb") as file:
            write_torch_file(file, value, fill)
        for mmap in (False, True):
            loaded = torch.load(path, weights_only=True, mmap=mmap)
            assert loaded[name] == value[name]
            for tensor, got in zip(tensors, loaded["tensors"], strict=True):
                assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
                assert (
                    got.reshape(-1).view(torch.uint8).tolist()
                    == filled[id(tensor)].reshape(-1).view(torch.uint8).tolist()
                )
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


def test_storages_lie_where_torch_would_put_them(tmp_path: Path) -> None:
    value: dict[str, Any] = {f"a{'b' * number}": torch.empty(number, dtype=torch.uint8) for number in range(1, 5)}
    with (tmp_path / "torch.pt").open("wb") as file:
        write_torch_file(file, value, lambda tensor: torch.full_like(tensor, 77))
    content = (tmp_path / "torch.pt").read_bytes()
    places = [place for place in range(0, len(content), 64) if content[place] == 77]
    assert len(places) == len(value)


def test_an_object_that_is_no_tensor_is_pickled_as_by_torch(tmp_path: Path) -> None:
    with (tmp_path / "torch.pt").open("wb") as file:
        write_torch_file(file, {"dtype": torch.bfloat16, "list": [1, "a"]}, pytest.fail)
    assert torch.load(tmp_path / "torch.pt", weights_only=True) == {"dtype": torch.bfloat16, "list": [1, "a"]}
