"""What is in a checkpoint, for people and for scripts."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from itertools import chain, islice
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..errors import CheckpointError
from .format.reading import Checkpoint, open_checkpoint

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_SHOWN_DEPTH = 100  # of containers in each other
_SHOWN_VALUES = 10**7  # in a container and those in it


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint; `parts`: in how many pieces it lies there."""

    key: str
    shape: list[int]
    dtype: str
    bytes: int
    parts: int


@dataclass
class Report:
    """What `inspect` finds.

    Attributes:
        written_by: versions and the time; None of a checkpoint of torch.distributed.checkpoint alone.
        values: what is no tensor, by key.
        steps: how many parameters have taken how many steps, by the number of steps.
        files: sizes.
        problems: what is damaged; of a damaged checkpoint, values and steps are not read.
    """

    path: str
    written_by: dict[str, str] | None = None
    facts: dict[str, Any] | None = None
    tensors: list[TensorEntry] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, dict[str, Any]]:
        """Tensors, elements and bytes by the first part of the key, such as "model" and "optimizer"."""
        totals: dict[str, dict[str, Any]] = {}
        for tensor in self.tensors:
            total = totals.setdefault(tensor.key.split(".")[0], {"tensors": 0, "elements": 0, "bytes": 0})
            total["tensors"] += 1
            total["elements"] += math.prod(tensor.shape)
            total["bytes"] += tensor.bytes
        return totals

    def as_json(self) -> dict[str, Any]:
        """Plain containers, numbers and strings."""
        return {
            **asdict(self),
            "values": {key: _plain(value) for key, value in self.values.items()},
            "totals": self.totals(),
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"checkpoint  {self.path}"
        if not self.files:
            yield from (f"cannot be opened: {problem}" for problem in self.problems)
            return
        if self.written_by is not None:
            yield "written by  zeroopt {zeroopt}, torch {torch}, {saved_at}".format(**self.written_by)
        for name, fact in (self.facts or {}).items():
            yield f"  {name}: {fact}"
        if self.steps:
            yield f"steps       {', '.join(f'{step} ({count} parameters)' for step, count in sorted(self.steps.items()))}"
        yield ""
        rows = [(t.key, " x ".join(map(str, t.shape)) or "scalar", t.dtype, _size(t.bytes)) for t in self.tensors]
        yield from _table([("tensor", "shape", "dtype", "size"), *rows])
        if self.values:
            yield ""
            yield from _table([(key, repr(value)) for key, value in self.values.items()])
        yield ""
        totals = self.totals().items()
        yield from _table(
            [("", "tensors", "elements", "size")]
            + [(name, str(t["tensors"]), str(t["elements"]), _size(t["bytes"])) for name, t in totals]
        )
        yield ""
        yield f"{len(self.files)} files, {_size(sum(self.files.values()))}"
        yield from (f"DAMAGED: {problem}" for problem in self.problems)
        if not self.problems:
            yield (
                "all files are as they were written"
                if self.written_by
                else "all files are there; they have no checksums"
            )


def inspect(path: str | os.PathLike[str]) -> Report:
    """Read a checkpoint through. Not collective; raises nothing when it is damaged, but tells."""
    report = Report(str(path))
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    _describe(checkpoint, report)
    report.problems += checkpoint.problems()
    if not report.problems:
        try:
            _read_values(checkpoint, report)
        except CheckpointError as error:
            report.problems.append(str(error))
    return report


def _describe(checkpoint: Checkpoint, report: Report) -> None:
    manifest = checkpoint.manifest
    if manifest is not None:
        saved_at = (_EPOCH + timedelta(microseconds=manifest.saved_at // 1000)).astimezone().isoformat(" ", "seconds")
        report.written_by = {"zeroopt": manifest.zeroopt, "torch": manifest.torch, "saved_at": saved_at}
        report.facts = manifest.facts
    for key, entry in checkpoint.metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            size = math.prod(entry.size) * dtype.itemsize
            name = str(dtype).removeprefix("torch.")
            report.tensors.append(TensorEntry(key, list(entry.size), name, size, len(entry.chunks)))
    report.files = {name: known if isinstance(known, int) else known.bytes for name, known in checkpoint.files.items()}


def _read_values(checkpoint: Checkpoint, report: Report) -> None:
    entries = checkpoint.metadata.state_dict_metadata
    report.values = checkpoint.read({key: None for key in entries if not checkpoint.is_tensor(key)})
    for key, value in report.values.items():
        _check_printable(key, value)
    scalars = {
        t.key: torch.empty(t.shape, dtype=torch.float64, device="cpu")
        for t in report.tensors
        if _is_step(t.key) and not t.shape
    }
    checkpoint.read(scalars)
    numbers = {key: value for key, value in report.values.items() if _is_step(key) and isinstance(value, (int, float))}
    steps = [*numbers.values(), *(float(step) for step in scalars.values())]
    if broken := [step for step in steps if isinstance(step, float) and not step.is_integer()]:
        raise CheckpointError(
            f"{len(broken)} parameters have taken a number of steps that is none, such as {broken[0]}"
        )
    report.steps = dict(Counter(int(step) for step in steps))


def _is_step(key: str) -> bool:
    return key.startswith("optimizer.state.") and key.endswith(".step")


def _check_printable(key: str, value: Any) -> None:
    """Raise CheckpointError for containers in themselves or in too many others, and for more values than can be printed."""
    level = [value]
    for _ in range(_SHOWN_DEPTH):
        level = list(islice((inner for one in level for inner in _inside(one)), _SHOWN_VALUES))
        if len(level) == _SHOWN_VALUES:
            raise CheckpointError(f"{key!r} has more than {_SHOWN_VALUES} values in it")
        if not level:
            return
    raise CheckpointError(f"{key!r} has more than {_SHOWN_DEPTH} containers in each other")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return chain(value, value.values())
    return value if isinstance(value, (list, tuple)) else ()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (type(None), bool, int, float, str)) else repr(value)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _size(count: int) -> str:
    for unit, bytes_of_unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_of_unit:
            return f"{count / bytes_of_unit:.1f} {unit}"
    return f"{count} B"
