"""A checkpoint on the disk: what is in it, whether it is whole, and its values. No code in it is run."""

from __future__ import annotations

import io
import os
import zlib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from ...errors import CheckpointError
from ..disk.directory import foreign_names
from ..disk.files import FilePart, FileRecord, OrdinaryFiles, open_ordinary
from ..disk.manifest import NAME, Manifest
from ..disk.paths import local_path
from ..disk.torch_file_bounds import check_torch_file
from .metadata import check_metadata
from .plain import load_metadata, load_plain
from .planning import ShardLoadPlanner
from .together import together
from .transformed import CheckedTransforms

_METADATA = ".metadata"


class Checkpoint:
    """A checkpoint of zeroopt, or one that torch.distributed.checkpoint alone wrote.

    Attributes:
        path: its directory.
        manifest: what zeroopt wrote of it; None of a checkpoint of DCP alone.
        metadata: DCP's.
    """

    def __init__(self, path: Path, manifest: Manifest | None, metadata: Metadata) -> None:
        self.path, self.manifest, self.metadata = path, manifest, metadata

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the run that wrote it has told of itself; None of a checkpoint of DCP alone."""
        return None if self.manifest is None else self.manifest.facts

    @property
    def identity(self) -> tuple[str, int]:
        """What tells it from other checkpoints."""
        return str(os.path.realpath(self.path)), 0 if self.manifest is None else self.manifest.saved_at

    def verify(self, group: dist.ProcessGroup | None) -> None:
        """Compare all files with the manifest; of a checkpoint of DCP alone, look only whether they are long enough.

        Collective in the group, whose ranks share out the files; without one, of this process alone.

        Raises:
            CheckpointError: on all ranks, with the files that are missing, damaged, or not of this checkpoint.
        """
        rank, size = (0, 1) if group is None else (group.rank(), group.size())

        def check_share() -> None:
            problems = [] if rank else self._foreign()
            names = sorted(self.files)
            problems += [problem for name in names[rank::size] if (problem := self._problem(name))]
            if problems:
                raise CheckpointError("; ".join(problems))

        together(group, f"checking {self.path}", check_share, lambda checked: [None] * len(checked))

    @property
    def files(self) -> dict[str, FileRecord | int]:
        """All files by name but the manifest: their records, or without a manifest the sizes that they must have at least."""
        if self.manifest is not None:
            return dict(self.manifest.files)
        ends: dict[str, FileRecord | int] = {}
        for place in self.metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        return ends

    def problems(self) -> list[str]:
        """What `verify` finds, of this process alone."""
        return self._foreign() + [problem for name in sorted(self.files) if (problem := self._problem(name))]

    def side_file(self, name: str) -> Any:
        """The object of a side file, its tensors on the CPU, or None when there is no such file.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        if self.manifest is None or name not in self.manifest.files:
            return None
        return load_plain(self.path / name, self.path / name)

    def read(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Fill tensors and ShardTensors in place, from whatever parts the checkpoint has of them. Not collective.

        Holds a saved part of one tensor at a time. Values are converted to the tensors' dtypes.

        Args:
            entries: by flat key, such as "optimizer.state.weight.exp_avg"; whatever stands for values that are no tensors.

        Returns:
            The values that are no tensors, by key.

        Raises:
            CheckpointError: nothing is changed when an entry is missing or of another shape; when a file is damaged, some
                entries may have been filled.
        """
        planner = ShardLoadPlanner(entries, self.metadata)
        try:
            plan = planner.create_local_plan()
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        self._read_items(plan.items, planner)
        return {key: planner.state_dict[key] for key in entries if not self.is_tensor(key)}

    def _read_items(self, items: list[ReadItem], planner: ShardLoadPlanner) -> None:
        """Give the planner what it has planned to read."""
        reader = _PartReader(self.path, self.metadata)
        reader.set_up_storage_reader(self.metadata, True)
        for name, of_file in self._by_file(items).items():
            try:
                reader.read_data(LoadPlan(of_file), planner).wait()
            except Exception as error:
                raise CheckpointError(f"cannot read {self.path / name}: {error}") from error

    def is_tensor(self, key: str) -> bool:
        """Whether an entry of the checkpoint is a tensor."""
        return isinstance(self.metadata.state_dict_metadata[key], TensorStorageMetadata)

    def _by_file(self, items: list[ReadItem]) -> dict[str, list[ReadItem]]:
        """In the order in which they lie in their files."""
        places = self.metadata.storage_data
        by_file = defaultdict(list)
        for item in items:
            if item.storage_index not in places:
                raise CheckpointError(f"{self.path / _METADATA} does not say where {item.storage_index} lies")
        for item in sorted(items, key=lambda item: int(places[item.storage_index].offset)):
            by_file[places[item.storage_index].relative_path].append(item)
        return by_file

    def _foreign(self) -> list[str]:
        """Names of the directory that the manifest does not know."""
        names = [] if self.manifest is None else foreign_names(self.path, self.manifest)
        return [f"{name} is not a file of this checkpoint: move it away" for name in names]

    def _problem(self, name: str) -> str | None:
        """What is wrong with a file, if anything is."""
        path, expected = self.path / name, self.files[name]
        try:
            if isinstance(expected, int):
                size = path.stat().st_size
                return f"{name} is cut off: it has {size} of {expected} bytes" if size < expected else None
            size = path.stat().st_size
            if size != expected.bytes:
                return f"{name} has {size} bytes, and had {expected.bytes} when it was written"
            if FileRecord.of(path) != expected:
                return f"{name} is damaged: its checksum is not what it was when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        return None


class _PartReader(FileSystemReader):
    """Reads parts of ordinary files, which take no more memory than they are long."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.fs = OrdinaryFiles()
        if hasattr(self, "transforms"):  # torch 2.7 and later
            self.transforms = CheckedTransforms(self.transforms, metadata)  # type: ignore[assignment]

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        part = io.BufferedReader(FilePart(file, sinfo.offset, sinfo.length))
        if not getattr(sinfo, "transform_descriptors", None):
            for _ in check_torch_file(part):
                pass
            part.seek(0)
        return part


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint of zeroopt or of DCP. Reads the manifest and DCP's metadata, and checks these. Not collective.

    Raises:
        CheckpointError: there is none, it is of a newer zeroopt, or one of the two is damaged.
    """
    directory = local_path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is {'a file' if directory.exists() else 'not there'}: no checkpoint")
    manifest = None
    with suppress(FileNotFoundError):
        manifest = Manifest.read(directory)
    try:
        with open_ordinary(directory / _METADATA) as file:
            content = file.read()
    except FileNotFoundError as error:
        _refuse_missing(directory, manifest, error)
    except OSError as error:
        raise CheckpointError(f"cannot read {directory / _METADATA}: {error.strerror}") from error
    if manifest is not None and manifest.files.get(_METADATA) != FileRecord(len(content), zlib.crc32(content)):
        raise CheckpointError(f"{directory / _METADATA} is damaged: it is not what the manifest says")
    return Checkpoint(directory, manifest, _parse(content, directory))


def _refuse_missing(directory: Path, manifest: Manifest | None, error: Exception) -> NoReturn:
    if manifest is not None:
        raise CheckpointError(f"{directory / _METADATA} is missing: the checkpoint is damaged") from error
    inside = sorted(str(path.parent.name) for path in directory.glob(f"*/{_METADATA}"))[:5]
    hint = f"; there are some in it: {', '.join(inside)}" if inside else ""
    raise CheckpointError(f"{directory} is not a checkpoint: it has neither {NAME} nor {_METADATA}{hint}") from error


def _parse(content: bytes, directory: Path) -> Metadata:
    try:
        metadata = load_metadata(content)
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        check_metadata(metadata)
    except Exception as error:
        raise CheckpointError(f"{directory / _METADATA} is damaged or no checkpoint's: {error}") from error
    return metadata
