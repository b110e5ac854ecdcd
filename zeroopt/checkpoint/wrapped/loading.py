"""`load`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...errors import CheckpointError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...state.dicts import LoadedState
from ...state.layout import describe_layout
from ..disk.manifest import runs_in
from ..format.extra import EXTRA, check_extra, rank_file, unpack_extra
from ..format.reading import Checkpoint, open_checkpoint
from ..format.together import together
from .contents import clean_name
from .groups import has_positions, match_groups, read_groups
from .lineage import goes_on
from .residuals import Order, checked_residuals, planned_like, residual_file, restore_residuals, sends_codes
from .saving import Optimizers, begin, check_group, optimizers_of
from .targets import Kind, Names, check_names, model_entries, model_target, state_target


def load(
    path: str | os.PathLike[str],
    model: ZeroDataParallel,
    optimizer: Optimizers | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    rank_extra: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    strict: bool = True,
    trained_only: bool = False,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
) -> dict[str, Any]:
    """Load a checkpoint into a wrapped model and its optimizer.

    The checkpoint may be of any world size, stage, bucket size, precision and split into DTensors, or one that
    torch.distributed.checkpoint alone wrote, of a model and an optimizer of plain torch, of DistributedDataParallel or of
    FSDP2. Each rank reads what it needs, into memory of its own; only when all ranks have theirs is anything changed. No
    code that the files might contain is run.

    Collective: every rank of the process group must call it.

    Args:
        path: the checkpoint's directory; see `latest`.
        optimizer: as for `save`. None loads the model alone, and leaves optimizers their state and options.
        process_group: as for `save`.
        extra, rank_extra: objects with `load_state_dict()` by the names that they were saved under. `rank_extra` is loaded
            where as many ranks saved.
        strict: the model and the checkpoint have to have the same names; else what both have is loaded, and the values, state
            and options of all other parameters stay as they are. Shapes have to be the same.
        trained_only: of the model, load only the parameters that its optimizers train; frozen ones and buffers stay as they are,
            whether or not the checkpoint has them.
        model_key, optimizer_key: under which names a checkpoint that zeroopt did not write has the model and the optimizer.

    Returns:
        All extra values that were saved, by name, with this rank's own: state dicts of objects, and plain values.

    Raises:
        CheckpointError: on all ranks, with the rank, the file or the name: the checkpoint is not there, damaged (all files
            are compared with their checksums first), of another model, or model and optimizer do not belong together. Nothing
            has been changed. So it is when the `load_state_dict` of an extra object raises.
        CollectiveError: other ranks have not called it, or are gone.
        StateError: there is no process group, or within `join()`.
    """
    group = begin(model, process_group)
    source = Source(str(path), partial(open_checkpoint, path), model_key, optimizer_key)
    return load_source(source, group, model, optimizer, extra, rank_extra, strict=strict, trained_only=trained_only)


class Source:
    """A checkpoint that is to be loaded, and the names in it.

    Args:
        name: for messages.
        opens: gives the checkpoint.
        model_key, optimizer_key: as for `load`.

    Attributes:
        checkpoint, model, optimizer: the checkpoint and its names, once it is open.
    """

    def __init__(
        self, name: str, opens: Callable[[], Checkpoint], model_key: str = "model", optimizer_key: str = "optimizer"
    ) -> None:
        self.name = name
        self._opens, self._model_key, self._optimizer_key = opens, model_key, optimizer_key

    def open(self, *, with_optimizer: bool) -> tuple[str, int]:
        """Open it, and return what tells it from others."""
        self.checkpoint = self._opens()
        self.model = self._names(self._model_key)
        if with_optimizer:
            self.optimizer = self._names(self._optimizer_key)
        return self.checkpoint.identity

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """The saved param_groups."""
        return read_groups(self.checkpoint, self.optimizer)

    def layout_for(self, optimizer: ZeroOptimizer) -> dict[str, Any]:
        """What a state dict says of itself under "zeroopt", as far as the checkpoint knows."""
        mine = self.facts_of(optimizer)
        if not mine:
            return {}
        params = optimizer.state_dicts.params
        # Where parameters were kept as they are here, so is their state.
        alike = [m for m in params if self._stored_dtype(m.name, mine["param_dtype"]) == str(m.local.dtype)]
        layout = describe_layout(
            alike,
            (),
            facts={},
            seed=mine["seed"],
            steps_since_average=mine["steps_since_average"],
            outer_options=mine.get("outer_options", ()),
        )
        return {"zeroopt": layout.to_dict()}

    def facts_of(self, optimizer: ZeroOptimizer) -> Mapping[str, Any]:
        """What the checkpoint knows of it; empty where that is nothing."""
        facts = self.checkpoint.facts
        of_all: list[dict[str, Any]] = [] if facts is None else facts["optimizers"]
        # By any parameter, for the first one may be new.
        names = {clean_name(name) for name in optimizer.names().values()}
        return next((one for one in of_all if one["first_param"] in names), {})

    def is_of(self, world_size: int) -> bool:
        """Whether so many ranks have saved it."""
        facts = self.checkpoint.facts
        return facts is not None and facts["world_size"] == world_size

    def _stored_dtype(self, name: str, param_dtype: str) -> str | None:
        """In what the run kept a parameter that it has saved as exactly as it could."""
        key = f"{self.model.prefix}.{clean_name(name)}"
        saved = self.model.tensor(key) if key in self.model else None
        return None if saved is None else str(saved.properties.dtype) if param_dtype == "None" else param_dtype

    def _names(self, prefix: str) -> Names:
        names = Names(self.checkpoint.metadata, prefix)
        if not names:
            found = sorted({key.partition(".")[0] for key in self.checkpoint.metadata.state_dict_metadata})
            raise CheckpointError(
                f"{self.name} has nothing under {prefix!r}, only {', '.join(map(repr, found))}: say with model_key and "
                "optimizer_key where it has the model and the optimizer, or leave out the optimizer to load the model alone"
            )
        return names


@torch.inference_mode(mode=False)  # state that is read there could not be stepped
@torch.no_grad()
def load_source(
    source: Source,
    group: dist.ProcessGroup,
    model: ZeroDataParallel,
    optimizer: Optimizers | None,
    extra: Mapping[str, Any] | None,
    rank_extra: Mapping[str, Any] | None,
    *,
    strict: bool = True,
    trained_only: bool = False,
    frozen: bool = True,
) -> dict[str, Any]:
    """What `load` does, from a checkpoint that may lie elsewhere. Collective in the group.

    Args:
        frozen: parameters that no optimizer trains are loaded, too, but for `trained_only`. The same on all ranks.
    """

    def open_source() -> _Opened:
        optimizers = optimizers_of(model, optimizer)
        check_group(model, group)
        identity = source.open(with_optimizer=bool(optimizers))
        is_first = model.replica.transport.control.rank == 0
        entries = model_entries(model, source.model, trained_only=trained_only, frozen=frozen) if is_first else {}
        return _Opened(identity, {key: entry.kind for key, entry in entries.items()})

    def compare(opened: list[_Opened]) -> list[None]:
        _check_same([one.identity for one in opened])
        wanted = {key: kind for one in opened for key, kind in one.kinds.items()}
        check_names(wanted, source.model, strict=strict, has_more=trained_only)
        return [None] * len(opened)

    together(group, f"opening the checkpoint {source.name}", open_source, compare)
    source.checkpoint.verify(group)
    reading = _Reading()

    def read() -> None:
        reading.take_extra(source, extra, rank_extra, group)
        reading.take_model(source, model, trained_only=trained_only, frozen=frozen)
        for one in optimizers_of(model, optimizer):
            reading.take_state(source, one, strict=strict)
        if optimizer is not None:
            reading.take_residuals(source, group)

    loaded: dict[str, Any] = {}
    with planned_like(_orders(source, group, model, optimizer)), ExitStack() as undo:
        together(group, f"reading the checkpoint {source.name}", read, lambda done: done)

        def load_extra() -> None:
            loaded.update(unpack_extra(extra, reading.extra, undo))
            loaded.update(unpack_extra(rank_extra, reading.rank_extra, undo))

        together(group, f"loading the extra values of {source.name}", load_extra, lambda done: done)
        undo.pop_all()
    reading.commit(model)
    facts = source.checkpoint.facts
    if optimizer is not None and facts is not None:
        goes_on(model, runs_in(facts))
    return loaded


def _orders(
    source: Source, group: dist.ProcessGroup, model: ZeroDataParallel, optimizer: Optimizers | None
) -> list[tuple[ZeroOptimizer, Order]]:
    """How buckets were planned, of what codes have left out, which only the same buckets go on from. The same on all ranks."""
    if optimizer is None or not source.is_of(group.size()) or not sends_codes(model.replica):
        return []
    return [(one, source.facts_of(one).get("order", [])) for one in optimizers_of(model, optimizer)]


class _Opened(NamedTuple):
    """What the ranks compare of a checkpoint that each of them has opened.

    Attributes:
        identity: what tells it from others.
        kinds: of the model's entries, by the checkpoint's keys; from the first rank of those that hold it.
    """

    identity: tuple[str, int]
    kinds: dict[str, Kind]


def _check_same(identities: list[tuple[str, int]]) -> list[None]:
    for rank, identity in enumerate(identities):
        if identity != identities[0]:
            raise CheckpointError(
                f"rank 0 opened {identities[0][0]} and rank {rank} opened {identity[0]}, which are not the same checkpoint: give "
                "all ranks the same path of a file system that they share"
            )
    return [None] * len(identities)


class _Reading:
    """What this rank has read, in memory of its own.

    Attributes:
        extra, rank_extra: as they were saved.
    """

    def __init__(self) -> None:
        self.extra: dict[str, Any] = {}
        self.rank_extra: dict[str, Any] = {}
        self._trained: list[Callable[[], None]] = []
        self._rest: list[Callable[[], None]] = []
        self._states: list[tuple[ZeroOptimizer, LoadedState]] = []
        self._residuals: Mapping[str, Any] | None = None

    def take_extra(
        self,
        source: Source,
        extra: Mapping[str, Any] | None,
        rank_extra: Mapping[str, Any] | None,
        group: dist.ProcessGroup,
    ) -> None:
        """Read the extra values, and see that all are there that are to be loaded."""
        checkpoint = source.checkpoint
        self.extra = checkpoint.side_file(EXTRA) or {}
        check_extra(extra, self.extra)
        if source.is_of(group.size()):
            self.rank_extra = checkpoint.side_file(rank_file(group.rank())) or {}
            check_extra(rank_extra, self.rank_extra)

    def take_model(self, source: Source, model: ZeroDataParallel, *, trained_only: bool, frozen: bool) -> None:
        """Read this rank's part of the model."""
        target = model_target(model, source.model, trained_only=trained_only, frozen=frozen)
        values = source.checkpoint.read(target.entries)
        self._trained = [partial(commit, values) for commit in target.trained]
        self._rest = [partial(commit, values) for commit in target.rest]

    def take_state(self, source: Source, optimizer: ZeroOptimizer, *, strict: bool) -> None:
        """Read this rank's part of an optimizer's state."""
        optimizer.check_may_load("load()")
        matched = match_groups(optimizer, source.groups, strict=strict)
        target = state_target(optimizer, source.optimizer, by_position=has_positions(source.groups))
        state = target.assemble(source.checkpoint.read(target.entries))
        state_dict = {
            "state": {managed.position: {} for managed in optimizer.state_dicts.params} | state,
            "param_groups": matched.groups,
            **source.layout_for(optimizer),
        }
        loaded = optimizer.state_dicts.read([state_dict], keeps=True)
        self._states.append((optimizer, replace(loaded, kept=matched.unknown)))

    def take_residuals(self, source: Source, group: dist.ProcessGroup) -> None:
        """Read what this rank keeps for itself, where as many ranks saved."""
        name, is_alike = residual_file(group.rank()), source.is_of(group.size())
        saved = source.checkpoint.side_file(name) if is_alike else None
        self._residuals = checked_residuals(saved or {}, name)

    def commit(self, model: ZeroDataParallel) -> None:
        """Let all of it be the model's and the optimizers'. Collective in the model's process group."""
        with ExitStack() as rewriting:
            for optimizer in model.optimizers:
                rewriting.enter_context(optimizer.rewriting_parameters())
            for commit in self._trained:
                commit()
        for optimizer, loaded in self._states:
            optimizer.adopt(loaded)
        if self._residuals is not None:
            restore_residuals(model, self._residuals)
        for commit in self._rest:
            commit()
