"""What a rank copies, and where it lies in a slot.

┌─────────────────────────┬─────────────────────────┬─────────────────────────────┬──────────────────────┐
│ tensors of checkpoints, │ those that this rank    │ what this rank alone keeps  │ values, no tensors   │
│ that all ranks have     │ alone has               │                             │                      │
└─────────────────────────┴─────────────────────────┴─────────────────────────────┴──────────────────────┘
                          │◀──────────── what travels to another host ────────────────────────────────────▶
"""

from __future__ import annotations

import io
import math
import pickle
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from ..checkpoint.format.plain import load_metadata
from ..checkpoint.format.planning import ShardSavePlanner
from ..state.entries import map_tensors
from ..state.shard_tensor import ShardTensor

_ALIGNMENT = 64
_LENGTH_BYTES = 8  # before the values
_ROOM = 2  # times as much as values take at first, for those that grow
_LEAST_ROOM = 1 << 16


class Entries:
    """What a rank has of a model and its optimizers at one moment: live tensors and values by flat key.

    Args:
        nested: as `own_contents` gives it.
        kept: tensors that no other rank needs, 1-D, in memory of their own.
        is_first: whether this is the first rank.
    """

    def __init__(self, nested: Mapping[str, Any], kept: Sequence[Tensor] = (), *, is_first: bool) -> None:
        self.kept = kept
        self.planner = ShardSavePlanner(nested, is_coordinator=is_first)
        self.planner.flatten()

    @property
    def signature(self) -> list[Any]:
        """What has to stay as it is for the same places to do: names, shapes, and which elements this rank has."""
        named = [(key, *_shape_of(value)) for key, value in self.planner.state_dict.items()]
        return [*named, *map(_shape_of, self.kept)]

    def is_shard(self, item: WriteItem) -> bool:
        """Whether it is of a tensor that steps alone change."""
        return isinstance(self.planner.state_dict[item.index.fqn], ShardTensor)

    def shards(self) -> Iterator[ShardTensor]:
        """All tensors that steps alone change."""
        return (value for value in self.planner.state_dict.values() if isinstance(value, ShardTensor))

    def tensor(self, item: WriteItem) -> Tensor:
        """The tensor of an item."""
        value = self.planner.resolve_data(item)
        assert isinstance(value, Tensor)
        return value

    def values(self, items: Sequence[WriteItem]) -> dict[str, Any]:
        """Those that are no tensors, by key."""
        return {item.index.fqn: self.planner.state_dict[item.index.fqn] for item in items}


def _shape_of(value: Any) -> tuple[Any, ...]:
    if isinstance(value, ShardTensor):
        return value.start, value.stop, value.dtype, tuple(value.shape)
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else ()


@dataclass(frozen=True)
class Places:
    """Where in a slot what a rank copies lies.

    Attributes:
        tensors: items of tensors, and where they begin.
        alike_end: where those of them end that all ranks have.
        kept_begin: where those begin that this rank alone keeps.
        values: items of other values.
        values_begin: where these begin, all together.
        slot_bytes: of all.
    """

    tensors: list[tuple[WriteItem, int]]
    alike_end: int
    kept_begin: int
    values: list[WriteItem]
    values_begin: int
    slot_bytes: int

    @staticmethod
    def of(plan: SavePlan, alike: Collection[str], kept: Sequence[Tensor] = (), packed_bytes: int = 0) -> Places:
        """For a plan of one rank, what it keeps, and values that take so many bytes now.

        Args:
            alike: names of tensors that all ranks have.
        """
        tensors, end, alike_end = [], 0, 0
        for item in sorted(plan.items, key=lambda item: item.index.fqn not in alike):
            if item.tensor_data is not None:
                tensors.append((item, end))
                num_bytes = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
                end += _aligned(num_bytes)
                alike_end = end if item.index.fqn in alike else alike_end
        kept_end = end + sum(_aligned(one.nbytes) for one in kept)
        values = [item for item in plan.items if item.tensor_data is None]
        room = max(_LEAST_ROOM, _ROOM * packed_bytes) + _LENGTH_BYTES
        return Places(tensors, alike_end, end, values, kept_end, kept_end + room)

    def views(self, slot: NDArray[np.uint8], *, alike: bool = False) -> list[tuple[WriteItem, Tensor]]:
        """Items of tensors, and their memory in a slot.

        Args:
            alike: only of those that all ranks have.
        """
        made = []
        for item, begin in self.tensors:
            if alike and begin >= self.alike_end:
                break
            assert item.tensor_data is not None
            made.append((item, view(slot, begin, item.tensor_data.chunk.sizes, item.tensor_data.properties.dtype)))
        return made

    def has_room(self, packed: bytes) -> bool:
        """Whether values fit."""
        return self.values_begin + _LENGTH_BYTES + len(packed) <= self.slot_bytes

    def table(self, metadata: Metadata | None, name: str) -> bytes:
        """What a reader needs: DCP's metadata, those of all ranks from the first one, and where the tensors of this one lie.

        Args:
            name: of the file.
        """
        storage: dict[MetadataIndex, Any] = {}
        for item, begin in self.tensors:
            storage[item.index] = _StorageInfo(name, begin, 0)
        for item in self.values:
            storage[item.index] = _StorageInfo(name, self.values_begin, 0)
        mine = Metadata({}) if metadata is None else metadata
        return pickle.dumps(
            Metadata(
                mine.state_dict_metadata,
                mine.planner_data,
                {
                    **storage,
                    _KEPT: _StorageInfo(name, self.kept_begin, 0),
                    _VALUES: _StorageInfo(name, self.values_begin, 0),
                },
            )
        )


# No tensor has these names.
_KEPT = MetadataIndex("kept")
_VALUES = MetadataIndex("values")


class Table(NamedTuple):
    """What `Places.table` has written. metadata: of its tensors. kept_begin, values_begin: as in `Places`."""

    metadata: Metadata
    kept_begin: int
    values_begin: int


def read_table(table: bytes) -> Table:
    """No code in it is run."""
    metadata: Metadata = load_metadata(table)
    kept_begin, values_begin = (metadata.storage_data.pop(index).offset for index in (_KEPT, _VALUES))
    return Table(metadata, kept_begin, values_begin)


def view(slot: NDArray[np.uint8], begin: int, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in a slot."""
    num_bytes = math.prod(sizes) * dtype.itemsize
    if not num_bytes:
        return torch.empty(tuple(sizes), dtype=dtype, device="cpu")
    return torch.from_numpy(slot[begin : begin + num_bytes]).view(dtype).view(tuple(sizes))


Shapes = Sequence[tuple[int, torch.dtype]]
"""Of tensors that a rank keeps: how many elements, and of what kind."""


def shapes_of(kept: Sequence[Tensor]) -> Shapes:
    """Those of some tensors."""
    return [(one.numel(), one.dtype) for one in kept]


def kept_views(slot: NDArray[np.uint8], begin: int, shapes: Shapes) -> list[Tensor]:
    """The memory in a slot of tensors that a rank keeps."""
    views = []
    for numel, dtype in shapes:
        views.append(view(slot, begin, (numel,), dtype))
        begin += _aligned(views[-1].nbytes)
    return views


def take_out(residuals: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """What `residual_contents` has, with a number for each tensor, and the tensors."""
    kept: list[Tensor] = []

    def number_of(tensor: Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    return map_tensors(residuals, number_of), kept


def put_back(numbered: Mapping[str, Any], kept: Sequence[Tensor]) -> dict[str, Any]:
    """What was given to `take_out`."""
    pieces = {
        what: {name: {**piece, "values": kept[piece["values"]]} for name, piece in numbered[what].items()}
        for what in ("left_out", "model")
        if what in numbered
    }
    return {**numbered, **pieces}


def pack(values: Any) -> bytes:
    """Values in bytes."""
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue()


def put_values(slot: NDArray[np.uint8], begin: int, packed: bytes) -> None:
    """Put packed values into a slot."""
    slot[begin : begin + _LENGTH_BYTES].view(np.int64)[0] = len(packed)
    begin += _LENGTH_BYTES
    slot[begin : begin + len(packed)] = np.frombuffer(packed, dtype=np.uint8)


def values_in(slot: NDArray[np.uint8], begin: int) -> io.BytesIO:
    """The packed values of a slot."""
    length = int(slot[begin : begin + _LENGTH_BYTES].view(np.int64)[0])
    begin += _LENGTH_BYTES
    return io.BytesIO(slot[begin : begin + length].tobytes())


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a tensor by one thread, without Python's lock where its bytes are side by side on the CPU."""
    source = source.detach()
    if source.is_cpu and source.is_contiguous() and source.numel():
        np.copyto(_as_bytes(target), _as_bytes(source))
    else:
        target.copy_(source)


def checksum_of(tensor: Tensor) -> int:
    """Of all its bits, in the order of its elements."""
    on_cpu = tensor.detach().cpu().contiguous()
    return zlib.crc32(_as_bytes(on_cpu).data) if on_cpu.numel() else 0


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return array
