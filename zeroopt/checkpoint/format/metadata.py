"""DCP's metadata: whether all in them is of the kind, and as large, as reading relies on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ...errors import CheckpointError
from ..disk.paths import is_file_name

_MOST = (1 << 63) - 1  # of bytes and elements
_MORE_POSITIONS = 10_000  # in lists than there are values, for what was empty leaves no trace


def check_metadata(metadata: Metadata) -> None:
    """Raise TypeError, ValueError or AttributeError where something is missing, not of the kind or not as large as it has to be."""
    stored = _check_places(metadata.storage_data)
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"{key!r} is no name")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(key, entry, stored)
        elif not isinstance(entry, BytesStorageMetadata):
            raise TypeError(f"{key!r} is a {type(entry).__name__}")
    _check_paths(metadata.planner_data or {})


def check_apart(key: str, saved: TensorStorageMetadata) -> None:
    """Raise CheckpointError where parts of a tensor lie upon each other, so that their elements cannot be counted.

    Args:
        saved: as `check_metadata` has let it pass.
    """
    if _overlap([(part.offsets, part.sizes) for part in saved.chunks if math.prod(part.sizes)]):
        raise CheckpointError(f"parts of {key!r} lie upon each other, so that it cannot be told which are right")


def _check_places(places: Mapping[Any, Any]) -> Counter[str] | None:
    """Where everything lies. Returns how many bytes there are under a name; None where they are in another form."""
    stored: Counter[str] = Counter()
    in_another_form = False
    for index, place in places.items():
        if not (isinstance(index, MetadataIndex) and isinstance(place, _StorageInfo)):
            raise TypeError(f"{index} is stored as {place}")
        if not (_is_count(place.offset) and _is_count(place.length)):
            raise TypeError(f"{index} lies at {place.offset}, {place.length} bytes")
        if not is_file_name(place.relative_path):
            raise ValueError(f"{index} is in {place.relative_path!r}, which is no file of the directory")
        stored[index.fqn] += place.length
        in_another_form |= bool(getattr(place, "transform_descriptors", None))
    return None if in_another_form else stored


def _check_tensor(key: str, entry: TensorStorageMetadata, stored: Counter[str] | None) -> None:
    properties, size = entry.properties, entry.size
    if not (isinstance(properties, TensorProperties) and isinstance(properties.dtype, torch.dtype)):
        raise TypeError(f"{key!r} has no dtype")
    if not _is_shape(size):
        raise TypeError(f"{key!r} has no shape, but {size!r}")
    if stored is not None and stored[key] < math.prod(size) * properties.dtype.itemsize:
        raise ValueError(f"{key!r} is of shape {list(size)}, and has no more than {stored[key]} bytes in the files")
    for part in entry.chunks:
        if not (isinstance(part, ChunkStorageMetadata) and _is_within(part.offsets, part.sizes, size)):
            raise ValueError(f"{key!r} is of shape {list(size)}, and has a part {part}")


def _is_within(offsets: Any, sizes: Any, size: Sequence[int]) -> bool:
    return (
        _is_shape(offsets)
        and _is_shape(sizes)
        and len(offsets) == len(sizes) == len(size)
        and all(first + count <= whole for first, count, whole in zip(offsets, sizes, size, strict=True))
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value)) and math.prod(value) <= _MOST


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _check_paths(paths: Mapping[Any, Any]) -> None:
    """Where values are in dicts and lists; a list is as long as its largest position, whatever else is in it."""
    for key, path in paths.items():
        if not (isinstance(path, tuple) and path and all(type(part) in (str, int) for part in path)):
            raise TypeError(f"{key!r} has no place in dicts and lists, but {path!r}")
        if any(isinstance(part, int) and not 0 <= part < len(paths) + _MORE_POSITIONS for part in path):
            raise ValueError(f"{key!r} is at {path}, and there are {len(paths)} values")


_Box = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes."""


def _overlap(boxes: Sequence[_Box]) -> bool:
    """Whether any two have elements in common."""
    if len(boxes) < 2 or not boxes[0][0]:
        return len(boxes) > 1
    # Along the dimension in which most of them begin at places of their own, few have to be compared.
    sweep = max(range(len(boxes[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    near: list[_Box] = []
    for box in sorted(boxes, key=lambda box: box[0][sweep]):
        near = [one for one in near if one[0][sweep] + one[1][sweep] > box[0][sweep]]
        if any(_meet(box, one) for one in near):
            return True
        near.append(box)
    return False


def _meet(box: _Box, other: _Box) -> bool:
    return all(
        first < second + second_size and second < first + first_size
        for first, first_size, second, second_size in zip(*box, *other, strict=True)
    )
