"""What a rank reads from a checkpoint: memory of its own for all of its part, so that nothing changes until all is there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ... import ops
from ...errors import CheckpointError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...pages import paged_zeros
from ...plan.dtensors import local_of
from ...plan.regions import FlatLayout
from ...state.entries import block_of, map_leaves
from ...state.shard_tensor import ShardTensor
from ...storage.bucket import Bucket
from ...storage.segment import Segment
from .contents import clean_name

Commit = Callable[[Mapping[str, Any]], None]


@dataclass
class Target:
    """What is to be read, by the checkpoint's keys, and what becomes of it.

    Attributes:
        entries: tensors to be filled, and None for other values.
        trained: what lets the values of trained parameters be the model's, once all ranks have theirs.
        rest: the same for buffers, frozen parameters, and what modules make to be saved.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    trained: list[Commit] = field(default_factory=list)
    rest: list[Commit] = field(default_factory=list)


class Names:
    """The keys of a checkpoint.

    Args:
        prefix: of those that are meant.
    """

    def __init__(self, metadata: Metadata, prefix: str) -> None:
        self.prefix = prefix
        self._saved = metadata.state_dict_metadata
        self._paths = metadata.planner_data or {}
        self._keys = sorted(key for key in self._saved if key.startswith(prefix + "."))

    def __bool__(self) -> bool:
        return bool(self._keys)

    def below(self, *path: str) -> Iterator[tuple[str, str]]:
        """Keys that begin with a path, and what follows it."""
        start = ".".join((self.prefix, *path)) + "."
        for index in range(bisect_left(self._keys, start), len(self._keys)):
            key = self._keys[index]
            if not key.startswith(start):
                return
            yield key, key.removeprefix(start)

    def path(self, key: str, name: str) -> list[str | int]:
        """The end of a key that is `name`, taken apart: numbers are positions in lists."""
        path = self._paths.get(key, ())
        for count in range(1, len(path) + 1):
            if ".".join(map(str, path[-count:])) == name:
                return list(path[-count:])
        return list(name.split("."))

    def tensor(self, key: str) -> TensorStorageMetadata | None:
        """What is known of a tensor; None for other values."""
        saved = self._saved[key]
        return saved if isinstance(saved, TensorStorageMetadata) else None

    def memory(self, key: str) -> Tensor | None:
        """Memory for all of a tensor; None for other values."""
        saved = self.tensor(key)
        return None if saved is None else torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")

    def __contains__(self, key: str) -> bool:
        return key in self._saved


class Kind(Enum):
    """Of a value in a model's state dict."""

    HELD = "a parameter or buffer"
    MADE = "made to be saved, such as an extra state; containers of values lie under names of their own"
    EMPTY = "made, and without any value, which leaves no trace"


class ModelEntry(NamedTuple):
    """Name and live value of an entry of a model's state dict."""

    name: str
    value: Any
    kind: Kind


def model_entries(
    model: ZeroDataParallel, names: Names, *, trained_only: bool, frozen: bool = True
) -> dict[str, ModelEntry]:
    """What a model's state dict has, by the checkpoint's keys.

    Args:
        trained_only: only parameters that optimizers train.
        frozen: parameters that they do not train, too.
    """
    trained = {managed.param for managed in model.replica.params}
    held: set[Tensor] = {*model.module.parameters(), *model.module.buffers()}

    def is_wanted(value: Any) -> bool:
        if isinstance(value, nn.Parameter):
            return value in trained or (frozen and not trained_only)
        return not trained_only

    def kind_of(value: Any) -> Kind:
        if isinstance(value, Tensor):
            return Kind.HELD if value in held else Kind.MADE
        return Kind.MADE if _has_values(value) else Kind.EMPTY

    return {
        f"{names.prefix}.{clean_name(name)}": ModelEntry(name, value, kind_of(value))
        for name, value in model.module.state_dict(keep_vars=True).items()
        if is_wanted(value)
    }


def _has_values(value: Any) -> bool:
    found: list[Any] = []
    map_leaves(value, lambda _, leaf: found.append(leaf))
    return bool(found)


def check_names(wanted: Mapping[str, Kind], names: Names, *, strict: bool, has_more: bool = False) -> None:
    """Raise CheckpointError for names that only the model, in all its parts, or only the checkpoint has; when not strict, where
    they have none in common.

    Args:
        has_more: the checkpoint may have more names.
    """
    known = {key: _saved_as(key, kind, names) for key, kind in wanted.items()}
    missing = sorted(key for key, saved in known.items() if not saved and wanted[key] is not Kind.EMPTY)
    expected = {key for saved in known.values() for key in saved}
    unexpected = [] if has_more else [key for key, _ in names.below() if key not in expected]
    if missing and len(missing) == len(known):
        raise CheckpointError(
            f"the model and the checkpoint have no name in common under {names.prefix!r}: the checkpoint lacks {_shown(missing)}, the "
            f"model lacks {_shown(unexpected)}. Rename either"
        )
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"the model and the checkpoint have different names under {names.prefix!r}: the checkpoint lacks {_shown(missing)}, the "
            f"model lacks {_shown(unexpected)}; strict=False loads what both have"
        )


def _saved_as(key: str, kind: Kind, names: Names) -> list[str]:
    """The keys of one entry of the model's state dict: of what is made, which may be a container, several."""
    if key in names:
        return [key]
    return [] if kind is Kind.HELD else [below for below, _ in names.below(key.removeprefix(names.prefix + "."))]


def model_target(model: ZeroDataParallel, names: Names, *, trained_only: bool, frozen: bool = True) -> Target:
    """The model's part, as far as the checkpoint has it."""
    target = Target()
    wanted = model_entries(model, names, trained_only=trained_only, frozen=frozen)
    aliases: dict[nn.Parameter, list[str]] = {}
    for key, (_, value, _) in wanted.items():
        if isinstance(value, nn.Parameter):
            aliases.setdefault(value, []).append(key)
    for bucket in model.replica.buckets:
        for segment in bucket.segments:
            for key in [key for key in aliases.get(segment.owner.param, []) if key in names][:1]:
                _target_param(target, key, bucket, segment)
    trained = {managed.param for managed in model.replica.params}
    for key, (_, value, kind) in wanted.items():
        if kind is Kind.HELD and key in names and value not in trained:
            _target_value(target, key, value)
    _target_made(target, {key: entry for key, entry in wanted.items() if entry.kind is not Kind.HELD}, names, model)
    return target


def _shown(keys: Sequence[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "nothing"


def _target_param(target: Target, key: str, bucket: Bucket, segment: Segment) -> None:
    """A trained parameter: this rank's part, as exact as it is kept."""
    values = paged_zeros(segment.numel, bucket.master.dtype, bucket.master.home)
    target.entries[key] = ShardTensor(segment.owner.flat_layout, segment.start, values)

    def commit(read: Mapping[str, Any]) -> None:
        bucket.master.write(*segment.range, values)

    target.trained.append(commit)


def _target_value(target: Target, key: str, value: Tensor) -> None:
    """What every rank has: a buffer or a frozen parameter."""
    copied = target.entries[key] = torch.empty_like(value.detach())

    def commit(read: Mapping[str, Any]) -> None:
        local_of(value.detach()).copy_(local_of(copied))

    target.rest.append(commit)


def _target_made(target: Target, made: Mapping[str, ModelEntry], names: Names, model: ZeroDataParallel) -> None:
    """What modules make to be saved: nobody but them knows where it belongs, so they take it as out of any state dict."""
    places = {entry.name: _places_in(key, entry.kind, names) for key, entry in made.items()}
    memory = {saved: names.memory(saved) for within in places.values() for saved in within}
    target.entries |= memory

    def commit(read: Mapping[str, Any]) -> None:
        state: dict[str, Any] = {}
        for name, within in places.items():
            for saved, path in within.items():
                put(state, [name, *path], {**memory, **read}[saved])
        model.module.load_state_dict(state, strict=False)

    if memory:
        target.rest.append(commit)


def _places_in(key: str, kind: Kind, names: Names) -> dict[str, list[str | int]]:
    """For each key of a value that is made, where in that it lies."""
    return {
        saved: [] if saved == key else names.path(saved, saved.removeprefix(f"{key}."))
        for saved in _saved_as(key, kind, names)
    }


@dataclass
class StateTarget:
    """What is to be read of an optimizer's state.

    Attributes:
        entries: as those of a `Target`.
        places: for each parameter by position, and each key, where in the parameter's state the value belongs.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    places: dict[int, dict[str, list[str | int]]] = field(default_factory=dict)

    def assemble(self, values: Mapping[str, Any]) -> dict[int, Any]:
        """The state by position, from what was read: by key, and elsewhere in `entries`."""
        state: dict[int, Any] = {}
        for position, places in self.places.items():
            for key, path in places.items():
                put(state.setdefault(position, {}), path, values.get(key, self.entries[key]))
        return state


def state_target(optimizer: ZeroOptimizer, names: Names, *, by_position: bool) -> StateTarget:
    """An optimizer's part of the state, and that of parameters that no rank steps.

    Args:
        by_position: the checkpoint has parameters by number, not by name.
    """
    target = StateTarget()
    dicts, known = optimizer.state_dicts, optimizer.names()
    segments = {s.owner.position: s for bucket in dicts.buckets for s in bucket.segments}
    state_dtype = dicts.precision.state_dtype
    for position in (*segments, *dicts.idle_params()):
        segment = segments.get(position)
        known_as = str(position) if by_position else clean_name(known[position])
        for key, name in names.below("state", known_as):
            if name in ops.SCALES and state_dtype is not torch.int8:
                continue
            target.entries[key] = (
                names.memory(key) if segment is None else _state_memory(name, names.tensor(key), segment)
            )
            target.places.setdefault(position, {})[key] = names.path(key, name)
    return target


def _state_memory(name: str, saved: TensorStorageMetadata | None, segment: Segment) -> Tensor | None:
    if saved is None:
        return None
    owner, device, dtype = segment.owner, segment.shard.device, saved.properties.dtype
    last = name.rpartition(".")[2]
    layout = owner.flat_layout
    if owner.is_whole and saved.size == owner.shape:
        return torch.empty_strided(owner.shape, owner.stride, dtype=dtype, device=device)  # as optimizers make it
    if owner.is_whole or last == "step":
        return torch.empty(saved.size, dtype=dtype, device=device if saved.size else "cpu")
    if block_of(last) > 1:
        first, end = segment.start // ops.QUANT_BLOCK, ops.num_blocks(segment.start + segment.numel)
        values = paged_zeros(end - first, dtype, device)
        return ShardTensor(FlatLayout.of(saved.size, [1]), first, values)
    if tuple(saved.size) == layout.full_shape:
        return ShardTensor(layout, segment.start, paged_zeros(segment.numel, dtype, device))
    return torch.empty(saved.size, dtype=dtype, device=device if saved.size else "cpu")


def put(container: Any, path: Sequence[str | int], value: Any) -> None:
    """Put a value into dicts and lists, which are made as they are needed; lists grow from their end."""
    for part, following in pairwise(path):
        container = _inside(container, part, [] if isinstance(following, int) else {})
    if isinstance(container, list):
        _inside(container, path[-1], None)
    container[path[-1]] = value


def _inside(container: Any, part: str | int, default: Any) -> Any:
    if isinstance(container, dict):
        return container.setdefault(part, default)
    assert isinstance(part, int)
    while len(container) <= part:
        container.append(None)
    if container[part] is None:
        container[part] = default
    return container[part]
