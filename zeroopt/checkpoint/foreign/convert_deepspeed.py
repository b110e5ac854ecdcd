"""Checkpoints of DeepSpeed, ZeRO stages 1 and 2, as state dicts of plain torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import StateError, ZeroOptError
from ..disk.files import read_ordinary
from .deepspeed_ranks import MODEL_FILE, RankFiles
from .deepspeed_universal import UniversalFiles
from .plain_state import check_shape, comparable_options, positions_by_group, whole_state_dict

_LATEST = ("latest", "latest_universal")
_MOST_BYTES_OF_TAG = 4096

_Files = RankFiles | UniversalFiles


def from_deepspeed(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    tag: str | None = None,
) -> dict[str, Any]:
    """What a run under DeepSpeed, ZeRO stage 1 or 2, has saved, as state dicts of plain torch.

        saved = from_deepspeed("checkpoints", model, optimizer)
        model.load_state_dict(saved["model"])
        model, optimizer = zeroopt.wrap(model, optimizer, param_dtype=torch.bfloat16)
        optimizer.load_state_dict(saved["optimizer"])

    Not collective; changes nothing. Nothing is rounded on the way, whether the model loads before it is wrapped or after, and
    each rank copies only its own part of the optimizer's state. A plain torch optimizer loads the same.

    The files are pickles, and DeepSpeed itself would unpickle them. Here they are read by torch's restricted unpickler,
    in which classes of DeepSpeed and of the user are replaced by inert stand-ins: nothing of the files is executed, and
    DeepSpeed need not be installed. Tensors are views of the files, mapped copy on write. Only those of which several
    ranks had a part take memory, and whole files that are no zip archives (DeepSpeed's `checkpoint_serialization:
    false`). Leave the files as they are until the state is loaded; a plain torch optimizer on the CPU keeps the very
    tensors that it is given, so copy them first (`copy.deepcopy`) if it is to outlive the files.

    Written for the layout of DeepSpeed 0.19; files without one of its keys are refused.

    Args:
        path: what `save_checkpoint` was given, or the directory of a tag in it, or what `ds_to_universal` has made.
        model: the model of that run, wrapped or not. Which of its parameters are frozen may have changed.
        optimizer: the one to load into, wrapped or not, over the same parameters, in any groups within which the saved
            options agree. That it is of the same kind as the one of that run is not looked at.
        tag: the checkpoint among those in `path`; None is the latest one.

    Returns:
        "model": trained parameters in float32, exactly as the optimizer of that run kept them; frozen ones and buffers
        in the dtype in which they were saved, and frozen ones that were left out (`exclude_frozen_parameters`) as
        `model` has them. "optimizer": the state dict of a plain torch optimizer. Options of its param_groups are the saved ones
        where there are such (`elastic_checkpoint` saves none), but for how torch is to compute (`foreach`, `fused`, …).
        DeepSpeed counts steps by group, so parameters that never had a gradient have state too. Schedulers, the loss
        scale of float16 and the user's `client_state` are not returned.

    Raises:
        StateError: files are missing, damaged, of different saves or of a layout that is not known, or belong to
            another model.
        NotSupportedError: they are of stage 3, or of a model that was split over ranks.
    """
    folder = _find_folder(Path(path), tag)
    try:
        return _converted(folder, model, optimizer)
    except ZeroOptError:
        raise
    except Exception as error:  # what values of other kinds than DeepSpeed's make of all that is computed of them
        raise StateError(
            f"{folder} has values of other kinds than DeepSpeed 0.19 saves ({type(error).__name__}: {error}): it is damaged, or its layout "
            "is not known"
        ) from error


def _converted(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    files: _Files = UniversalFiles(folder) if UniversalFiles.is_in(folder) else RankFiles(folder)
    names = _positions_by_name(model, optimizer)
    _check_names(files, model, names)
    return {"model": _model_state(files, model), "optimizer": _optimizer_state(files, optimizer, names)}


def _find_folder(path: Path, tag: str | None) -> Path:
    if not path.is_dir():
        raise StateError(f"there is no directory {path}")
    if tag is None and (UniversalFiles.is_in(path) or any(path.glob("*_states.pt"))):
        return path
    if tag is None:
        pointers = [path / name for name in _LATEST if (path / name).is_file()]
        if not pointers:
            raise StateError(
                f"{path} has neither {MODEL_FILE} nor a file 'latest': pass the directory of a checkpoint, or its tag"
            )
        tag = _tag_in(pointers[0])
    folder = path / tag
    if not folder.is_dir():
        raise StateError(
            f"there is no checkpoint {tag!r} in {path}; there are "
            f"{sorted(p.name for p in path.iterdir() if p.is_dir())}"
        )
    return folder


def _tag_in(pointer: Path) -> str:
    """The name of the checkpoint that a file 'latest' names."""
    try:
        tag = read_ordinary(pointer, _MOST_BYTES_OF_TAG).decode().strip()
    except (OSError, ValueError) as error:
        raise StateError(f"{pointer} does not name a checkpoint: {error}") from error
    if not tag or PurePath(tag).is_absolute() or ".." in PurePath(tag).parts:
        raise StateError(f"{pointer} names {tag!r}, which leads elsewhere: pass the tag of a checkpoint")
    return tag


def _positions_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Positions in the optimizer by name; those of tied parameters by each of their names."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    positions = {param: position for position, param in enumerate(params)}
    return {
        name: positions[param] for name, param in model.named_parameters(remove_duplicate=False) if param in positions
    }


def _check_names(files: _Files, model: nn.Module, positions: Mapping[str, int]) -> None:
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, group in files.model.groups.items():
        if name not in params:
            raise StateError(
                f"{files.folder} has parameter {name!r}, the model has not: it was saved with another model, or with "
                f"one in another wrapper. The model's first parameter is {next(iter(params), None)!r}"
            )
        if name not in positions:
            raise StateError(
                f"{files.folder} has the optimizer's state of parameter {name!r}, which is not one of the optimizer's: "
                "build that over all parameters that were trained (they may be frozen)"
            )
        shape = files.model.shapes[group][name]
        if shape != tuple(params[name].shape):
            raise StateError(
                f"{files.folder} has parameter {name!r} of shape {list(shape)}, the model has "
                f"{list(params[name].shape)}: it was saved with another model"
            )


def _model_state(files: _Files, model: nn.Module) -> dict[str, Any]:
    own = model.state_dict()
    params = dict(model.named_parameters(remove_duplicate=False))
    masters = {params[name]: _checked_master(files, name) for name in files.model.groups}
    for key in files.model.module:
        if key not in own:
            raise StateError(f"{files.model.path} has {key!r}, the model has not: it was saved with another model")
    return {key: _model_value(files, masters, params.get(key), key, value) for key, value in own.items()}


def _model_value(
    files: _Files, masters: Mapping[nn.Parameter, Tensor], param: nn.Parameter | None, key: str, own: Any
) -> Any:
    if param is not None and param in masters:
        return masters[param]
    if key in files.model.module:
        value = files.model.module[key]
        if isinstance(own, Tensor):
            check_shape(key, "module", value, own, files.model.path)
        return value
    if param is None or param.requires_grad:
        raise StateError(f"{files.model.path} has no {key!r}, which the model has: it was saved with another model")
    return own


def _checked_master(files: _Files, name: str) -> Tensor:
    """A parameter in float32. What the model computed with must be there as well, and be that, rounded."""
    master, value = files.master(name), files.model.module.get(name)
    if value is None or not torch.allclose(
        master.to(value.dtype), value, rtol=torch.finfo(value.dtype).eps, atol=0, equal_nan=True
    ):
        raise StateError(
            f"{files.folder} has parameter {name!r} in float32 and as the model had it, and they differ by more than "
            "rounding: files are damaged, of different saves, or mixed up (as universal checkpoints of runs with "
            "round_robin_gradients are: convert what the ranks have saved)"
        )
    return master


def _optimizer_state(files: _Files, optimizer: torch.optim.Optimizer, positions: Mapping[str, int]) -> dict[str, Any]:
    state = {positions[name]: files.state(name) for name in files.model.groups}
    options = []
    for group, members in zip(optimizer.param_groups, positions_by_group(optimizer), strict=True):
        saved = {name: index for name, index in files.model.groups.items() if positions[name] in members}
        options.append(_agreed_options(files, group, saved))
    return whole_state_dict(optimizer, state, options)


def _agreed_options(files: _Files, group: Mapping[str, Any], members: Mapping[str, int]) -> Mapping[str, Any]:
    """The saved options of parameters that are in one param_group now.

    Args:
        members: the saved group of each one, by name.
    """
    if files.options is None or not members:
        return {}
    saved: Sequence[Mapping[str, Any]] = files.options
    first = next(iter(members))
    for name, index in members.items():
        if not saved[index].get("bias_correction", True) and "bias_correction" not in group:
            raise StateError(
                f"{files.folder} was saved by an optimizer with bias_correction=False, which this one does not know: "
                "it would take other steps"
            )
        here, there = (comparable_options(saved[i], group) for i in (members[first], index))
        if here != there:
            raise StateError(
                f"parameters {first!r} and {name!r} are in one param_group of the optimizer, but {files.folder} has "
                f"them in groups with {_difference(here, there)}: make the groups of that run"
            )
    return saved[members[first]]


def _difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    name = next(n for n in {**here, **there} if here.get(n) != there.get(n))
    return f"{name}={here.get(name)} and {name}={there.get(name)}"
