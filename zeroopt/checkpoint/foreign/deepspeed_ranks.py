"""What DeepSpeed's ZeRO stages 1 and 2 write when they save a checkpoint: a file of each rank, and one of the model.

A param_group is one vector, cut into a partition for each rank:

    parameters   | a     | b               | c   | . .    padding at the end; with `parameter_alignment` behind each one
    partitions   | of rank 0     | of rank 1       |      without the padding at the end, or with it

in the order of "param_shapes" in the file of the model. (The files of the ranks have "param_slice_mappings" too, with
which `ds_to_universal` finds parameters; but in runs with `round_robin_gradients` those are of another order, and
wrong.)

The layout is that of DeepSpeed's runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py, `state_dict()`, and of
runtime/engine.py, `_common_checkpoint_state()`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import NotSupportedError, StateError
from .inert_pickle import StandIn, load_inert
from .plain_state import make_step

MODEL_FILE = "mp_rank_00_model_states.pt"
_RANK_FILE = re.compile(r"((?:bf16_|fp16_)?zero_pp_rank_)(\d+)_mp_rank_(\d+)_optim_states\.pt")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelFile:
    """What DeepSpeed has saved of the model.

    Attributes:
        module: the model's state dict: parameters and buffers in the dtypes in which it computed. Frozen parameters may
            be missing.
        shapes: of the trained parameters, for each param_group, by name.
    """

    path: Path
    version: str
    module: Mapping[str, Tensor]
    shapes: Sequence[Shapes]

    @staticmethod
    def read(folder: Path) -> ModelFile:
        """Read it.

        Raises:
            StateError: the file is missing or damaged, or of a layout that is not known.
            NotSupportedError: the model was split over ranks.
        """
        if not (folder / MODEL_FILE).is_file() and any(folder.glob("zero_pp_rank_*_model_states.pt")):
            raise stage_3(folder)
        _check_one_part(folder)
        path = folder / MODEL_FILE
        saved = load_mapping(path)
        version = str(saved.get("ds_version"))
        if saved.get("mp_world_size", 1) != 1 or saved.get("num_experts"):
            raise _split(path, f"mp_world_size {saved.get('mp_world_size')}, num_experts {saved.get('num_experts')}")
        module, shapes = (entry(saved, name, path, version) for name in ("module", "param_shapes"))
        return ModelFile(path, version, module, [{name: tuple(shape) for name, shape in g.items()} for g in shapes])

    @cached_property
    def groups(self) -> dict[str, int]:
        """Which param_group each trained parameter was in."""
        return {name: index for index, shapes in enumerate(self.shapes) for name in shapes}


class _Place(NamedTuple):
    """Where a parameter is: in the vector of its group, elements [start, stop)."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class _RankFile:
    """What one rank has saved. All lists have an entry for each param_group.

    Attributes:
        masters: float32, 1-D, this rank's partition, with or without the padding behind the last parameter.
        paddings: elements of that padding.
        states: the optimizer's state of the partition, whose tensors are as long as it, with or without padding.
        gaps: elements of padding behind each parameter; None where there is none.
        options: of the param_groups; None where none were saved.
    """

    path: Path
    masters: Sequence[Tensor]
    paddings: Sequence[int]
    states: Sequence[Mapping[str, Any]]
    gaps: Sequence[Sequence[int]] | None
    options: Sequence[Mapping[str, Any]] | None

    @staticmethod
    def read(path: Path, num_ranks: int, num_groups: int) -> _RankFile:
        file = load_mapping(path)
        version = str(file.get("ds_version"))
        saved = entry(file, "optimizer_state_dict", path, version)
        check_stage(saved, path)
        _check_count(path, entry(saved, "partition_count", path, version), num_ranks)
        base = entry(saved, "base_optimizer_state", path, version)
        is_plain = isinstance(base, Mapping)
        options = entry(base, "param_groups", path, version) if is_plain else None
        states = [entry(base, "state", path, version).get(i, {}) for i in range(num_groups)] if is_plain else list(base)
        step = saved.get("base_optimizer_state_step")
        steps = [step if options is None else group.get("step") for group in options or [{}] * num_groups]
        result = _RankFile(
            path,
            masters=entry(saved, "single_partition_of_fp32_groups", path, version),
            paddings=entry(saved, "group_paddings", path, version),
            states=[state if s is None else {"step": s, **state} for state, s in zip(states, steps, strict=True)],
            gaps=saved.get("param_alignment_paddings"),
            options=options,
        )
        result._check(num_groups)
        return result

    def _check(self, num_groups: int) -> None:
        for name in ("masters", "paddings", "states", "gaps", "options"):
            part = getattr(self, name)
            if part is not None and len(part) != num_groups:
                raise StateError(
                    f"{self.path} has {len(part)} param_groups in its {name}, the file of the model has {num_groups}"
                )

    def is_partition(self, group: int, key: str) -> bool:
        """Whether a state has an element for each one of the partition."""
        value = self.states[group][key]
        if not isinstance(value, Tensor) or value.dim() == 0:
            return False
        numel = self.masters[group].numel()
        if value.shape not in ((numel,), (numel + self.paddings[group],)):
            raise StateError(
                f"{self.path} has {key!r} of shape {list(value.shape)} in group {group}, whose partition has {numel} "
                "elements: state other than an element for each one of the parameters is not supported"
            )
        return True


class RankFiles:
    """A checkpoint as the ranks have written it.

    Files are mapped, not read: a parameter's tensor is a view of its rank's file, and has memory of its own only where
    more than one rank has a part of it.
    """

    def __init__(self, folder: Path) -> None:
        """Open all files.

        Raises:
            StateError: a file is missing or damaged, or of a layout that is not known.
            NotSupportedError: it is of stage 3, or the model was split over ranks.
        """
        self.folder = folder
        paths = _rank_paths(folder)
        self.model = ModelFile.read(folder)
        self._ranks = [_RankFile.read(path, len(paths), len(self.model.shapes)) for path in paths]
        self._places = dict(self._place())

    @property
    def options(self) -> Sequence[Mapping[str, Any]] | None:
        """Of the param_groups; None where none were saved."""
        return self._ranks[0].options

    def master(self, name: str) -> Tensor:
        """A trained parameter in float32."""
        return self._join(name, [rank.masters[self._places[name].group] for rank in self._ranks])

    def state(self, name: str) -> dict[str, Any]:
        """The optimizer's state of a parameter, in its shape."""
        group = self._places[name].group
        keys = list(self._ranks[0].states[group])
        for rank in self._ranks:
            self._check_same("state", group, sorted(keys), sorted(rank.states[group]), rank)
        return {key: self._entry(group, name, key) for key in keys}

    def _entry(self, group: int, name: str, key: str) -> Any:
        values = [rank.states[group][key] for rank in self._ranks]
        is_partition = self._ranks[0].is_partition(group, key)
        for rank, value in zip(self._ranks, values, strict=True):
            if rank.is_partition(group, key) != is_partition or not is_partition:
                self._check_same(key, group, values[0], value, rank)
        if is_partition:
            return self._join(name, values)
        return make_step(values[0], self._ranks[0].path) if key == "step" else values[0]

    def _check_same(self, what: str, group: int, expected: Any, value: Any, rank: _RankFile) -> None:
        if not _is_same(value, expected):
            raise StateError(
                f"{rank.path} has {what} {value} in group {group}, {self._ranks[0].path.name} has {expected}: they are "
                "not of one save"
            )

    def _place(self) -> Iterator[tuple[str, _Place]]:
        """Where each parameter is; also checks that the partitions hold all of them, and no more."""
        for group, shapes in enumerate(self.model.shapes):
            gaps = self._ranks[0].gaps
            behind = [0] * len(shapes) if gaps is None else gaps[group]
            stop = 0
            for (name, shape), gap in zip(shapes.items(), behind, strict=True):
                start, numel = stop, math.prod(shape)
                yield name, _Place(group, start, start + numel)
                stop = start + numel + gap
            found = sum(rank.masters[group].numel() for rank in self._ranks)
            padding = sum(rank.paddings[group] for rank in self._ranks)
            if not stop <= found <= stop + padding:
                raise StateError(
                    f"{self.folder} has {found} elements in group {group} of its ranks' files, {self.model.path.name} "
                    f"has parameters of {stop}: they are not of one save"
                )

    def _join(self, name: str, partitions: Sequence[Tensor]) -> Tensor:
        """A parameter's elements out of all partitions of its group."""
        place, parts, begin = self._places[name], [], 0
        for partition in partitions:
            end = begin + partition.numel()
            first, last = max(place.start, begin), min(place.stop, end)
            if first < last:
                parts.append(partition[first - begin : last - begin])
            begin = end
        whole = parts[0] if len(parts) == 1 else torch.cat([partitions[0][:0], *parts])  # or none, of no elements
        return whole.view(self.model.shapes[place.group][name])


def _rank_paths(folder: Path) -> list[Path]:
    """The files of all ranks, in their order."""
    matches = [match for path in folder.iterdir() if (match := _RANK_FILE.fullmatch(path.name))]
    if not matches:
        raise StateError(
            f"{folder} has no '…zero_pp_rank_…_optim_states.pt': the run did not use ZeRO, or these files were not "
            f"copied. Without ZeRO, {MODEL_FILE} holds the model under 'module' and the optimizer's state dict under "
            "'optimizer'"
        )
    prefixes = sorted({match[1] for match in matches})
    if len(prefixes) > 1:
        raise StateError(
            f"{folder} has files of several runs, {' and '.join(f'{p}…' for p in prefixes)}: take away those of others"
        )
    ranks = sorted({int(match[2]) for match in matches})
    paths = [folder / f"{prefixes[0]}{rank}_mp_rank_00_optim_states.pt" for rank in range(len(ranks))]
    for rank, path in enumerate(paths):
        if ranks[rank] != rank:
            raise StateError(f"there is no file {path}, and one of rank {ranks[-1]}")
    return paths


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    return type(value) is type(other) and bool(value == other)


def _check_count(path: Path, counts: int | Sequence[int], num_ranks: int) -> None:
    expected = counts if isinstance(counts, int) else max(counts)
    if expected > num_ranks:
        last = _RANK_FILE.sub(rf"\g<1>{expected - 1}_mp_rank_00_optim_states.pt", path.name)
        raise StateError(
            f"{path} is of a run of {expected} ranks, but {last} is missing in its directory: copy it there"
        )
    if expected < num_ranks:
        raise StateError(
            f"{path} is of a run of {expected} ranks, but there are files of {num_ranks}: take away those of another "
            "run"
        )


def entry(saved: Any, key: str, path: Path, version: str) -> Any:
    """`saved[key]`, which every known layout has.

    Raises:
        StateError: it has none.
    """
    if not isinstance(saved, Mapping) or saved.get(key) is None:
        raise StateError(
            f"{path}, written by DeepSpeed {version}, has no {key!r}: its layout is not known. Load it with a "
            "DeepSpeed that knows it, save it with 0.19, and convert that"
        )
    return saved[key]


def load_mapping(path: Path) -> Mapping[str, Any]:
    """The dict in a file. Raises StateError when there is none."""
    saved = load_inert(path)
    if not isinstance(saved, Mapping):
        raise StateError(f"{path} holds a {type(saved).__name__}, expected a dict: its layout is not known")
    return saved


def check_stage(saved: Mapping[str, Any], path: Path) -> None:
    """Raise NotSupportedError when an optimizer's state dict is one of stage 3."""
    stage = saved.get("zero_stage", 1)  # DeepSpeed's BF16_Optimizer does not say, and is stage 1
    if isinstance(stage, StandIn) and stage.args:  # of an enum
        stage = stage.args[0]
    if stage not in (1, 2):
        raise stage_3(path)


def stage_3(path: Path) -> NotSupportedError:
    """The error for files of stage 3."""
    return NotSupportedError(
        f"{path} is of ZeRO stage 3, which is not supported: convert it with DeepSpeed's ds_to_universal, load that "
        "with DeepSpeed in stage 1 or 2, and save it"
    )


def _check_one_part(folder: Path) -> None:
    for path in sorted(folder.glob("*_states.pt")):
        ranks = re.search(r"mp_rank_(\d+)", path.name)
        if path.name.startswith(("layer_", "expert_", "expp_")) or (ranks is not None and int(ranks[1]) > 0):
            raise _split(path, "a file of a part")


def _split(path: Path, evidence: str) -> NotSupportedError:
    return NotSupportedError(
        f"{path} belongs to a model that was split over ranks ({evidence}): tensor, pipeline and expert parallel "
        "checkpoints are not supported"
    )
