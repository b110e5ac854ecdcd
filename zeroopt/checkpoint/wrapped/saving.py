"""`save` and `async_save`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ...collectives.lone import default_group, is_lone
from ...collectives.second_group import second_group
from ...errors import CheckpointError, ConfigError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...state.entries import map_tensors
from ..disk.paths import local_path
from ..format.extra import EXTRA, pack_extra, rank_file
from ..format.remembered import Remembered
from ..format.together import together
from ..format.writing import write_checkpoint
from .contents import model_contents, state_contents
from .lineage import runs_of
from .parts import Part, describe_part, join_parts
from .residuals import residual_contents, residual_file

_log = logging.getLogger("zeroopt")

Optimizers = ZeroOptimizer | Sequence[ZeroOptimizer]


def save(
    path: str | os.PathLike[str],
    model: ZeroDataParallel,
    optimizer: Optimizers | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    rank_extra: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    keep: int | None = None,
    trained_only: bool = False,
) -> None:
    """Save a wrapped model and its optimizer to the directory `path`, which is there entirely or not at all.

    Every rank writes its own part at the same time, and holds no more than one tensor's copy besides what it has. The
    directory is put in place when all is on the disk; a process killed before leaves `path`, and what was there, as they were.

    It is a checkpoint of torch.distributed.checkpoint, with the names and shapes of plain torch: a plain model and
    optimizer load it as `{"model": get_model_state_dict(m), "optimizer": get_optimizer_state_dict(m, o)}`.

    Collective: every rank of the process group must call it, with paths of one file system that all of them see. With an
    `outer_optimizer` the other process groups save after the same step, each to a path of its own.

    Args:
        path: where nothing is, or a checkpoint, which is replaced at once.
        optimizer: what `zeroopt.wrap` returned, or all of them in the order of wrapping. None saves the model alone.
        extra: by name, what else is to be saved, the same on all ranks (that of the first rank is): objects with
            `state_dict()` (schedulers, GradScaler, …), or plain containers, numbers, strings and tensors.
        rank_extra: the same, of each rank alone, such as the state of its random number generators.
        process_group: ranks that together hold the model: all ranks when None. With other models on other ranks, or ranks that
            train replicas alone (`average_every`), those of this one.
        keep: how many checkpoints next to `path` remain, with this one, of those that this run has written, or one from which it has
            gone on; the oldest are removed. All when None.
        trained_only: of the model, save only the parameters that its optimizers train, where all else is kept elsewhere (the base
            model of adapters, or the weights that a trainer saves besides). `load` needs the same then.

    Raises:
        CheckpointError: on all ranks, with the rank, the file and the reason: it cannot be written, or not be saved like
            this, or `path` is a URL. What was at `path` is as it was.
        CollectiveError: other ranks have not called it, or are gone.
        StateError: there is no process group, or within `join()`.
    """
    group = begin(model, process_group)
    snapshot = _take(path, model, optimizer, extra, rank_extra, group, trained_only=trained_only)
    write_checkpoint(
        path,
        snapshot.entries,
        snapshot.facts,
        snapshot.side_files,
        group,
        keep,
        _remembered.setdefault(group, Remembered()),
    )


def async_save(
    path: str | os.PathLike[str],
    model: ZeroDataParallel,
    optimizer: Optimizers | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    rank_extra: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    keep: int | None = None,
    trained_only: bool = False,
) -> Future[None]:
    """As `save`, but return as soon as this rank's part has been copied to CPU memory, and write it in the background.

    Collective in the call; what follows is done by a thread, over a Gloo group of its own. The next `save`, `async_save` or
    `load` over the same ranks waits for it first, and raises what it raised, on all ranks, whether or not some have asked
    for the result before. `destroy_process_group` may come before it is there. A process that ends without having asked for
    it still waits until the checkpoint is in place; a failure is then only logged. Where a rank dies or stops meanwhile, it
    fails within the timeout of the process group.

    Returns:
        A future. `result()` waits until the checkpoint is in place, and raises what `save` would.
    """
    group = begin(model, process_group)
    snapshot = _take(path, model, optimizer, extra, rank_extra, group, trained_only=trained_only, copies=True)
    background = _background_group(group)
    remembered = _remembered.setdefault(group, Remembered())
    pending = _thread().submit(
        write_checkpoint, path, snapshot.entries, snapshot.facts, snapshot.side_files, background, keep, remembered
    )
    pending.add_done_callback(_log_failure)
    _pending[group] = pending
    return pending


def _log_failure(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        _log.error("a checkpoint that was to be saved in the background is not there: %s", error)


@dataclass(frozen=True)
class _Snapshot:
    """What this rank is to write; see `write_checkpoint`."""

    entries: dict[str, Any]
    facts: dict[str, Any]
    side_files: dict[str, Any]

    def copied(self) -> _Snapshot:
        """The same in memory of its own, on the CPU."""
        return _Snapshot(map_tensors(self.entries, _copy), self.facts, map_tensors(self.side_files, _copy))


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def optimizers_of(model: ZeroDataParallel, optimizer: Optimizers | None) -> list[ZeroOptimizer]:
    """The optimizers that were given, checked: none, or all of the model."""
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    if not isinstance(model, ZeroDataParallel):
        raise ConfigError(
            f"expected the model that zeroopt.wrap returned, got a {type(model).__name__}; torch.distributed.checkpoint saves and "
            "loads plain models"
        )
    for one in optimizers:
        if not isinstance(one, ZeroOptimizer):
            raise ConfigError(f"expected optimizers that zeroopt.wrap returned, got a {type(one).__name__}")
        if one.replica is not model.replica:
            raise ConfigError("the optimizer was not wrapped with this model")
    if optimizer is not None and sorted(map(id, optimizers)) != sorted(map(id, model.optimizers)):
        raise ConfigError(
            f"the model has {len(model.optimizers)} optimizers, {len(optimizers)} were given: give each of them once, as a list, "
            "or None for the model alone"
        )
    return optimizers


def _take(
    path: str | os.PathLike[str],
    model: ZeroDataParallel,
    optimizer: Optimizers | None,
    extra: Mapping[str, Any] | None,
    rank_extra: Mapping[str, Any] | None,
    group: dist.ProcessGroup,
    *,
    trained_only: bool,
    copies: bool = False,
) -> _Snapshot:
    """What this rank is to write. Collective.

    Args:
        trained_only: as for `save`.
        copies: take copies.
    """
    taken: list[_Snapshot] = []

    def take() -> _Taken:
        target = os.path.realpath(local_path(path))
        optimizers = optimizers_of(model, optimizer)
        check_group(model, group)
        model.replica.gathers.finish_all()
        for one in model.optimizers:
            one.check_can_save(group)
            one.follow_writes()
        side_files: dict[str, Any] = {} if rank_extra is None else {rank_file(group.rank()): pack_extra(rank_extra)}
        if group.rank() == 0:
            side_files[EXTRA] = pack_extra(extra)
        entries = own_contents(model, optimizers, trained_only=trained_only)
        if optimizers:
            residuals = residual_contents(model)
            if residuals:
                side_files[residual_file(group.rank())] = residuals
        snapshot = _Snapshot(entries, {}, side_files)
        taken.append(snapshot.copied() if copies else snapshot)
        is_first = model.replica.transport.control.rank == 0
        return _Taken(target, bool(optimizers), describe_part(model, optimizers) if is_first else None)

    parts = together(group, f"saving the checkpoint {path}", take, _joined)
    snapshot = taken[0]
    if group.rank() == 0:
        if optimizer is not None:
            snapshot.entries["optimizer"]["param_groups"] = [entry for part in parts for entry in part.param_groups]
        optimizer_facts = [entry for part in parts for entry in part.facts]
        snapshot.facts.update(world_size=group.size(), optimizers=optimizer_facts, runs=runs_of(model))
    return snapshot


def own_contents(
    model: ZeroDataParallel,
    optimizers: Sequence[ZeroOptimizer],
    *,
    trained_only: bool = False,
    frozen: bool = True,
) -> dict[str, Any]:
    """What this rank has of a model and its optimizers, as `write_checkpoint` takes it, without their options. Live tensors."""
    state = {name: entry for one in optimizers for name, entry in state_contents(one).items()}
    contents: dict[str, Any] = {"model": model_contents(model, trained_only=trained_only, frozen=frozen)}
    if optimizers:
        contents["optimizer"] = {"state": state}
    return contents


class _Taken(NamedTuple):
    """What the ranks compare. part: from the first rank of each process group."""

    path: str
    with_optimizer: bool
    part: Part | None


def _joined(taken: Sequence[_Taken]) -> list[list[Part]]:
    """The parts of all ranks, for the first one."""
    for rank, (path, with_optimizer, _) in enumerate(taken):
        if path != taken[0].path:
            raise CheckpointError(
                f"rank 0 was to save to {taken[0].path} and rank {rank} to {path}: give all the same path"
            )
        if with_optimizer != taken[0].with_optimizer:
            raise CheckpointError(
                f"only one of rank 0 and rank {rank} was given an optimizer: give it to all or to none"
            )
    return [join_parts([one.part for one in taken if one.part is not None]), *[[]] * (len(taken) - 1)]


def begin(model: ZeroDataParallel, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Before anything is saved or loaded: the group of ranks that do so together, none of which is busy with saving.

    Raises:
        StateError: there is no process group, though several processes were started, or within `join()`.
        CheckpointError: what a save in the background raised.
        ConfigError, RankMismatchError: param_groups were edited, and cannot be trained as they are.
    """
    group = default_group() if process_group is None else process_group
    if isinstance(model, ZeroDataParallel):  # else refused when all ranks can hear of it
        model.features.join.check_outside("saving or loading a checkpoint")
        for one in model.optimizers:
            one.take_up_groups()
    pending = _pending.pop(group, None)
    if pending is not None:
        pending.result()
    return group


def check_group(model: ZeroDataParallel, group: dist.ProcessGroup) -> None:
    """Raise ConfigError when ranks without which the model is not whole are not in the group."""
    replica = model.replica
    if replica.transport.control.size > 1:
        missing = {*dist.get_process_group_ranks(replica.group)} - {*dist.get_process_group_ranks(group)}
        if missing:
            raise ConfigError(
                f"the model was wrapped on rank {min(missing)} too, which is not in the process_group of this call: leave "
                "process_group out, or give one of all ranks that hold parts of the model"
            )


# By the group whose ranks save: the thread's own group, the save that is under way, and what they know of the last one.
_background_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
_pending: WeakKeyDictionary[dist.ProcessGroup, Future[None]] = WeakKeyDictionary()
_remembered: WeakKeyDictionary[dist.ProcessGroup, Remembered] = WeakKeyDictionary()


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="zeroopt.checkpoint")


def _background_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The one in which the thread tells others what it does, the same for all saves. Collective for the first."""
    if is_lone(group):
        return group
    if group not in _background_groups:
        _background_groups[group] = second_group(group, "connecting for saves in the background")
    return _background_groups[group]
