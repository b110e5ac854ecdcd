"""What reading relies on is there, of its kind, and no larger than the files; or all of it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from zeroopt import CheckpointError
from zeroopt.checkpoint.format.metadata import check_apart, check_metadata


def tensor(*parts: tuple[tuple[int, ...], tuple[int, ...]], size: tuple[int, ...] = (4, 6)) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts]
    return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)


def made() -> Metadata:
    index = MetadataIndex("a", torch.Size([0, 0]), 0)
    return Metadata({"a": tensor(((0, 0), (4, 6)))}, {"a": ("a", 0)}, {index: _StorageInfo("__0_0.distcp", 0, 500)})


def replace(**changed: Any) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.__dict__.update(changed)


def of_tensor(**changed: Any) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.state_dict_metadata["a"].__dict__.update(changed)


def of_part(**changed: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.__dict__.update(changed)

    return change


def without(name: str) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.__dict__.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        replace(state_dict_metadata=[]),
        replace(state_dict_metadata={3: tensor()}),
        replace(state_dict_metadata={"a": 3}),
        replace(storage_data=None),
        replace(planner_data={"a": "a"}),
        replace(planner_data={"a": ("a", -1)}),
        replace(planner_data={"a": ("a", 10**9)}),
        without("storage_data"),
        without("state_dict_metadata"),
        of_tensor(size=torch.Size([1 << 30, 1 << 30])),
        of_tensor(size=torch.Size([4, 600])),
        of_tensor(size=(4, "6")),
        of_tensor(properties=None),
        of_tensor(properties=TensorProperties("float32")),  # type: ignore[arg-type]
        of_tensor(chunks=[ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([4, 6]))]),
        of_tensor(chunks=[ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))]),
        of_tensor(chunks=[None]),
        of_part(offset=-1),
        of_part(length=True),
        of_part(length=1 << 70),
        of_part(relative_path="../secret"),
        of_part(relative_path="a\0b"),
        of_part(relative_path=7),
    ],
)
def test_what_is_not_as_it_should_be_is_refused(change: Callable[[Metadata], None]) -> None:
    metadata = made()
    check_metadata(metadata)
    change(metadata)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        check_metadata(metadata)


boxes = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4), st.integers(0, 6)).map(
    lambda box: ((box[0], box[1]), (min(box[2], 4 - box[0]), min(box[3], 6 - box[1])))
)


@given(st.lists(boxes, max_size=5))
def test_parts_upon_each_other_are_refused(parts: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    times = torch.zeros(4, 6)
    for (row, column), (rows, columns) in parts:
        times[row : row + rows, column : column + columns] += 1
    if times.max() > 1:
        with pytest.raises(CheckpointError, match="parts of 'a' lie upon each other"):
            check_apart("a", tensor(*parts))
    else:
        check_apart("a", tensor(*parts))


def test_a_number_has_one_part() -> None:
    check_apart("a", tensor(((), ()), size=()))
    with pytest.raises(CheckpointError, match="upon each other"):
        check_apart("a", tensor(((), ()), ((), ()), size=()))
