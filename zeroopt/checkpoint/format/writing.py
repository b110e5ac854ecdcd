"""All ranks write one checkpoint, each its own part, and it is there entirely or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ...errors import CheckpointError
from ..disk.directory import aside, commit
from ..disk.files import CheckedFiles, FileRecord
from ..disk.manifest import Manifest, as_json, runs_in
from ..disk.paths import local_path
from ..disk.siblings import keep_newest, next_number
from .plain import check_plain
from .planning import ShardSavePlanner
from .remembered import Remembered
from .together import together

_METADATA = ".metadata"


def write_checkpoint(
    path: str | os.PathLike[str],
    entries: Mapping[str, Any],
    facts: dict[str, Any],
    side_files: Mapping[str, Any],
    group: dist.ProcessGroup | None,
    keep: int | None = None,
    remembered: Remembered | None = None,
) -> None:
    """Write a checkpoint to `path`, in place of the one that is there, if any.

    Collective in the group; without one, of this process alone. The ranks must see the same file system. A rank holds one
    tensor's copy at a time. When the call returns, all is on the disk; a process killed before leaves `path` as it was.

    Args:
        entries: a nested dict of tensors, ShardTensors and plain values, which DCP flattens: `{"model": {"weight": …}}` has
            the key "model.weight". Each rank gives what it has; what several give plainly is written once. Empty containers
            leave no trace.
        facts: what else is to be known of the run, plain JSON. Those of rank 0 count.
        side_files: names of files to objects, saved by torch.save; of this rank, so other ranks use other names. A view
            of a tensor is saved with its whole storage.
        keep: how many checkpoints of the same runs, by `facts["runs"]`, remain next to `path` with this one; the oldest are removed.
            All, with None.
        remembered: what these ranks need not tell again of the checkpoint that they wrote last; then of this one.

    Raises:
        CheckpointError: on all ranks, with the rank, the file and the reason. `path` is as it was, and nothing remains of
            the new one.
    """
    target = Path(os.path.realpath(local_path(path)))
    rank = 0 if group is None else group.rank()
    planner = ShardSavePlanner(entries, is_coordinator=rank == 0)
    known = Remembered() if remembered is None else remembered
    local = SavePlan([])
    with ExitStack() as left_aside:
        left_aside.push(lambda kind, *_: None if kind is None else known.forget())

        def plan_part() -> SavePlan | int:
            nonlocal local
            as_json(facts)
            if keep is not None and keep < 1:
                raise CheckpointError(f"keep has to be at least 1, or None to keep all; got {keep}")
            for name, value in side_files.items():
                if name != os.path.basename(name) or name.startswith("."):
                    raise CheckpointError(f"{name!r} cannot be the name of a file beside the checkpoint's own")
                check_plain(value, name)
            local = planner.create_local_plan()
            return known.number if known.number is not None and known.has_planned(local) else local

        def plan_all(told: list[SavePlan | int]) -> list[_Planned]:
            if all(one == known.number for one in told):
                directory = left_aside.enter_context(aside(target))
                return [_Planned(directory, None, known.number)] * len(told)
            plans = [one for one in told if isinstance(one, SavePlan)]
            if len(plans) < len(told):
                return [_Planned(target, None, None)] * len(told)
            planned, _ = planner.create_global_plan(plans)
            directory, number = left_aside.enter_context(aside(target)), time.time_ns()
            return [_Planned(directory, plan, number) for plan in planned]

        what = f"preparing the checkpoint {target}"
        directory, plan, number = together(group, what, plan_part, plan_all)
        if number is None:  # something is new on some rank, so rank 0 has to hear of all
            directory, plan, number = together(group, what, lambda: local, plan_all)
        if plan is not None and number is not None:
            known.take_plan(number, local, plan)
        assert known.plan is not None
        mine = known.plan
        writer = _PartWriter(directory, rank)

        def write() -> _Part:
            results, records = writer.write_part(mine, planner, side_files)
            is_new = not known.has_written(results)
            known.take_results(results)
            return results if is_new else None, records

        def finish(parts: list[_Part]) -> list[None]:
            told = [results for results, _ in parts]
            if known.metadata is None:
                writer.finish(planner.metadata, [results for results in told if results is not None])
            elif any(results is not None for results in told):
                writer.finish(*known.merge(told))
            else:
                writer.write_metadata(known.metadata)
            if remembered is not None:
                known.metadata = writer.metadata()
            files = {name: record for _, records in parts for name, record in records.items()}
            manifest = Manifest.of(as_json(facts), files | writer.fs.records, next_number(target), time.time_ns())
            manifest.write(directory, writer.fs)
            commit(directory, target)
            return [None] * len(parts)

        together(group, f"writing the checkpoint {target}", write, finish)
    if keep is not None and rank == 0:
        keep_newest(target, keep, runs_in(facts))


class _Planned(NamedTuple):
    """What rank 0 answers.

    Attributes:
        directory: where files are written.
        plan: of one rank; None: what it remembers.
        number: of the save in which it was planned; None: tell it all.
    """

    directory: Path
    plan: SavePlan | None
    number: int | None


# Where what a rank has written lies, or None where rank 0 knows it, and its files.
_Part = tuple[list[WriteResult] | None, dict[str, FileRecord]]


class _PartWriter(FileSystemWriter):
    """Writes one rank's part, and on rank 0 DCP's metadata of all.

    That of torch would hold two tensors' copies at a time, and sync files before all of them has gone to the system.
    """

    fs: CheckedFiles

    def __init__(self, directory: Path, rank: int) -> None:
        super().__init__(directory, sync_files=False)
        self.fs = CheckedFiles()
        self._directory, self._name = directory, f"__{rank}_0.distcp"

    def storage_meta(self) -> StorageMeta:
        """Without the path, which is not where the checkpoint will be."""
        return StorageMeta(save_id=self.save_id)

    def write_metadata(self, metadata: bytes) -> None:
        """Write what an earlier `finish` has written."""
        with self.fs.create_stream(self._directory / _METADATA, "wb") as stream:
            stream.write(metadata)

    def metadata(self) -> bytes:
        """What has been written."""
        return (self._directory / _METADATA).read_bytes()

    def write_part(
        self, plan: SavePlan, planner: SavePlanner, side_files: Mapping[str, Any]
    ) -> tuple[list[WriteResult], dict[str, FileRecord]]:
        """Write this rank's files. Raises CheckpointError, with the file and the reason."""
        results: list[WriteResult] = self.write_data(planner.finish_plan(plan), planner).value()
        for name, value in side_files.items():
            with self.fs.create_stream(self._directory / name, "wb") as stream:
                torch.save(value, stream)
        return results, self.fs.records

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of a plan into one file, if there are any."""
        future: Future[list[WriteResult]] = Future()
        results = []
        if plan.items:
            with self.fs.create_stream(self._directory / self._name, "wb") as stream:
                for item in plan.items:
                    offset = stream.tell()
                    _write_item(item, planner, stream)
                    length = stream.tell() - offset
                    results.append(WriteResult(item.index, length, _StorageInfo(self._name, offset, length)))
        future.set_result(results)
        return future


def _write_item(item: WriteItem, planner: SavePlanner, stream: Any) -> None:
    value = planner.resolve_data(item)
    if isinstance(value, torch.Tensor):
        torch.save(_alone(value.detach().cpu()), stream)
    else:
        stream.write(value.getbuffer())
    stream.check()


def _alone(value: torch.Tensor) -> torch.Tensor:
    """The same elements as all of a storage, for torch.save writes whole storages: where they lie, or a copy with gaps closed."""
    if value.untyped_storage().nbytes() == value.nbytes:
        return value
    if value.numel() == 0 or not value.is_contiguous():
        return value.clone()
    memory = value.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=value.dtype).view(value.shape)
