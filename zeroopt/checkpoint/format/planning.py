"""What a rank writes and reads, planned as DCP does; ShardTensors are known here, and need nothing of torch."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import find_state_dict_object

from ...errors import CheckpointError
from ...plan.dtensors import local_of
from ...state.shard_tensor import ShardTensor
from .metadata import check_apart
from .plain import check_plain, load_plain


class ShardSavePlanner(DefaultSavePlanner):
    """Plans what to write of a nested dict, whose keys DCP joins by dots.

    Tensors without elements are written too. What several ranks have plainly is written once.
    """

    def __init__(self, entries: Mapping[str, Any], *, is_coordinator: bool) -> None:
        super().__init__(flatten_sharded_tensors=False)
        self._entries, self._is_coordinator = entries, is_coordinator

    def flatten(self) -> None:
        """Have `state_dict` hold what was given by flat key."""
        self.set_up_planner(dict(self._entries), is_coordinator=self._is_coordinator)
        self.state_dict = {key: _with_elements(value) for key, value in self.state_dict.items()}

    def create_local_plan(self) -> SavePlan:
        """This rank's part. Raises CheckpointError for what could not be loaded again."""
        self.flatten()
        shards = {key: value for key, value in self.state_dict.items() if isinstance(value, ShardTensor)}
        rest = {key: value for key, value in self.state_dict.items() if key not in shards}
        for key, value in rest.items():
            check_plain(value, key)
        items = create_default_local_save_plan(rest, self._is_coordinator).items
        for key, shard in shards.items():
            items += shard.__create_write_items__(key, shard)
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each rank writes of the plans of all, and DCP's metadata. Raises CheckpointError when a part is missing."""
        _check_whole(all_plans)
        plans, metadata = super().create_global_plan(all_plans)
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor or value of a write item."""
        return _find(self.state_dict, index)


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans what to read into flat entries: tensors are filled, other values replaced."""

    def __init__(self, entries: Mapping[str, Any], metadata: Metadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state_dict, self._saved = dict(entries), metadata

    def create_local_plan(self) -> LoadPlan:
        """This rank's part.

        Raises:
            CheckpointError: names the entry that is missing, not a tensor, of another shape, or not there entirely, or whose parts lie
                upon each other.
        """
        items = []
        for key, value in self.state_dict.items():
            items += self._read_items(key, value)
        return LoadPlan(items)

    def _read_items(self, key: str, value: Any) -> list[ReadItem]:
        saved = self._saved.state_dict_metadata.get(key)
        if saved is None:
            raise CheckpointError(f"the checkpoint has no {key!r}")
        if isinstance(saved, BytesStorageMetadata):
            return self._default_items(key, value)
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{key!r} is a tensor in the checkpoint, and a {type(value).__name__} was given to read it into"
            )
        if value.shape != saved.size:
            raise CheckpointError(
                f"{key!r} has shape {list(saved.size)} in the checkpoint, and {list(value.shape)} was expected"
            )
        if isinstance(value, ShardTensor):
            items = create_read_items_for_chunk_list(key, saved, value.__create_chunk_list__())
        else:
            items = self._default_items(key, value)
        found, expected = sum(math.prod(item.lengths) for item in items), _numel_here(value)
        if found != expected:
            raise CheckpointError(
                f"the checkpoint has {found} of the {expected} elements of {key!r} that this rank needs"
            )
        check_apart(key, saved)
        return items

    def _default_items(self, key: str, value: Any) -> list[ReadItem]:
        return create_default_local_load_plan({key: value}, self._saved).items

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value, without running code."""
        key = read_item.dest_index.fqn
        self.state_dict[key] = load_plain(value, key)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor to read into."""
        tensor: Tensor = _find(self.state_dict, index)
        return tensor


def _check_whole(plans: Sequence[SavePlan]) -> None:
    """DCP does the same, but not of a single rank, and does not say it as clearly."""
    tensors = {item.index: item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None}
    given: Counter[str] = Counter()
    for index, part in tensors.items():
        given[index.fqn] += math.prod(part.chunk.sizes)
    for index, part in tensors.items():
        if given[index.fqn] != math.prod(part.size):
            raise CheckpointError(
                f"the ranks together give {given[index.fqn]} of the {math.prod(part.size)} elements of {index.fqn!r}. All ranks "
                "that have a part of the model have to save it together"
            )


def _find(entries: dict[str, Any], index: MetadataIndex) -> Any:
    value = entries.get(index.fqn)
    if isinstance(value, ShardTensor):
        return value.__get_tensor_shard__(index)
    return find_state_dict_object(entries, index)


def _with_elements(value: Any) -> Any:
    """The value; a plain tensor instead of a shard of a tensor without elements, of which no rank has a part."""
    if isinstance(value, ShardTensor) and value.numel() == 0:
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")
    return value


def _numel_here(value: Tensor) -> int:
    if isinstance(value, ShardTensor):
        return value.stop - value.start
    return local_of(value).numel()
