"""The copies of all ranks of one step, as a checkpoint that any number of ranks loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from ..checkpoint.format.extra import EXTRA, rank_file
from ..checkpoint.format.plain import load_plain
from ..checkpoint.format.planning import ShardLoadPlanner
from ..checkpoint.format.reading import Checkpoint
from ..checkpoint.wrapped.residuals import residual_file
from .contents import Table, kept_views, put_back, read_table, values_in, view
from .slots import Slots


class StoredCheckpoint(Checkpoint):
    """A checkpoint in memory.

    Args:
        directory: of the job.
        step: that all of these have whole.
        parts: of all ranks that copied, in their order.
    """

    def __init__(self, directory: Path, step: int, parts: Sequence[Slots]) -> None:
        tables = [read_table(part.table) for part in parts]
        first = tables[0].metadata
        storage = {index: place for table in tables for index, place in table.metadata.storage_data.items()}
        super().__init__(directory, None, Metadata(first.state_dict_metadata, first.planner_data, storage))
        self._step = step
        self._slots = {}
        self._tables: dict[str, Table] = {}
        for part, table in zip(parts, tables, strict=True):
            slot = part.slot_of(step)
            assert slot is not None
            self._slots[part.path.name] = part.bytes_of(slot)
            self._tables[part.path.name] = table
        self._names = list(self._slots)
        self._packed: dict[str, dict[str, Any]] = {}
        self._sizes = {
            (key, tuple(chunk.offsets)): chunk.sizes
            for key, saved in first.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
            for chunk in saved.chunks
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What the run has told of itself."""
        facts: dict[str, Any] = self._values(self._names[0])["facts"]
        return facts

    @property
    def left_out(self) -> dict[str, int] | None:
        """Checksums of the frozen parameters, by name, where they were not copied; None: they were."""
        left_out: dict[str, int] | None = self.facts.get("frozen")
        return left_out

    @property
    def identity(self) -> tuple[str, int]:
        """What tells it from others: the same on all hosts, whose directories may have different names."""
        return self._names[0], self._step

    def verify(self, group: dist.ProcessGroup | None) -> None:
        """Nothing: what is not whole is not among the parts."""

    def side_file(self, name: str) -> Any:
        """What a rank has saved besides."""
        owners = {EXTRA: 0}
        for rank in range(len(self._names)):
            owners |= {rank_file(rank): rank, residual_file(rank): rank}
        if name not in owners:
            return None
        file = self._names[owners[name]]
        values = self._values(file)
        found = values["side"].get(name)
        if found is None or name != residual_file(owners[name]):
            return found
        return put_back(found, kept_views(self._slots[file], self._tables[file].kept_begin, values["kept"]))

    def _read_items(self, items: list[ReadItem], planner: ShardLoadPlanner) -> None:
        for item in items:
            index = item.storage_index
            if item.type is LoadItemType.BYTE_IO:
                planner.state_dict[item.dest_index.fqn] = self._value(index)
                continue
            part = tuple(
                slice(first, first + size) for first, size in zip(item.storage_offsets, item.lengths, strict=True)
            )
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._tensor(index)[part])
            planner.commit_tensor(item, target)

    def _tensor(self, index: MetadataIndex) -> Tensor:
        saved = self.metadata.state_dict_metadata[index.fqn]
        assert isinstance(saved, TensorStorageMetadata) and index.offset is not None
        place = self.metadata.storage_data[index]
        sizes = self._sizes[index.fqn, tuple(index.offset)]
        dtype: torch.dtype = saved.properties.dtype
        return view(self._slots[place.relative_path], place.offset, sizes, dtype)

    def _value(self, index: MetadataIndex) -> Any:
        name = self.metadata.storage_data[index].relative_path
        return self._values(name)["values"][index.fqn]

    def _values(self, name: str) -> dict[str, Any]:
        if name not in self._packed:
            packed = values_in(self._slots[name], self._tables[name].values_begin)
            self._packed[name] = load_plain(packed, self.path / name)
        return self._packed[name]
