"""What is saved of wrapped models and optimizers, whole or by parts."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from ...errors import CheckpointError, NotSupportedError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer

if TYPE_CHECKING:
    from ...checkpoint.format.reading import Checkpoint

# By these names among the extra values of a directory: what Lightning saves besides, and how many groups each optimizer has.
_REST, _GROUPS = "lightning", "groups"
_PARTS = {"state_dict", "optimizer_states"}
_PATH = "parts_in"  # in the place of an optimizer's state: where it is


def whole_state(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """What the plain optimizer's state dict would be, on rank 0; elsewhere nothing. Collective."""
    optimizer.consolidate_state_dict(to=0)
    return optimizer.full_state_dict() if optimizer.replica.control.rank == 0 else {}


def read_file(path: str | os.PathLike[str], weights_only: bool | None) -> dict[str, Any]:
    """A file of a Trainer. It is mapped, so that the ranks of a host share what they read of it, and none holds all.

    Raises:
        RuntimeError: it is of a format that cannot be mapped.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    # What callbacks keep would otherwise hold on to the file, also when it has been removed.
    rest = {name: value for name, value in content.items() if name not in _PARTS}
    return {**content, **tree_map_only(Tensor, Tensor.clone, rest)}


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError where a file, local and of torch.save, is damaged, or would take more memory than it is long."""
    from ...checkpoint.format import plain  # imports DCP, which takes long

    plain.check_file(Path(path), Path(path))


def save_parts(path: str | os.PathLike[str], content: Mapping[str, Any], model: ZeroDataParallel) -> None:
    """Save what a Trainer has dumped to a directory, to which each rank writes its own part. Collective.

    Args:
        content: with "state_dict", which has to be the model's, and with "optimizer_states" unless weights alone are wanted.

    Raises:
        NotSupportedError: a hook has changed "state_dict". On all ranks that find it; nothing has been written.
        CheckpointError: as `zeroopt.checkpoint.save`.
    """
    from ... import checkpoint  # imports DCP, which takes long

    own, given = model.state_dict(), content["state_dict"]
    if own.keys() != given.keys() or not all(_is_same(own[name], given[name]) for name in own):
        raise NotSupportedError(
            "a hook (on_save_checkpoint) has changed the state_dict that is to be saved, and parts are saved of the model as it is: "
            'leave state_dict_type at "full"'
        )
    optimizers = list(model.optimizers) if "optimizer_states" in content else None
    rest = io.BytesIO()
    torch.save({name: value for name, value in content.items() if name not in _PARTS}, rest)
    extra = {
        _REST: torch.frombuffer(rest.getbuffer(), dtype=torch.uint8),
        _GROUPS: [len(optimizer.param_groups) for optimizer in optimizers or ()],
    }
    checkpoint.save(path, model, optimizers, extra)


def open_parts(
    path: str | os.PathLike[str], weights_only: bool | None, group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """What a Trainer would read from a file, of a directory: "optimizer_states" are left to `load_parts`. Collective in the group.

    Raises:
        CheckpointError: it is damaged, or was not saved by a Trainer.
    """
    from ...checkpoint.format.reading import open_checkpoint

    opened = open_checkpoint(path)
    opened.verify(group)
    extra = _extra(opened)
    content = {**_unpack(extra[_REST], path, weights_only), "state_dict": _read_model(opened)}
    if extra[_GROUPS]:
        content["optimizer_states"] = [{_PATH: os.fspath(path)} for _ in extra[_GROUPS]]
    return content


def is_parts(states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether optimizers' states are what `open_parts` has put in their place."""
    return bool(states) and _PATH in states[0]


def load_parts(states: Sequence[Mapping[str, Any]], model: ZeroDataParallel) -> None:
    """Read what `open_parts` has left: each rank its part of the optimizers' state, and exact weights. Collective.

    Raises:
        CheckpointError: as `zeroopt.checkpoint.load`. Nothing has been changed.
    """
    from ... import checkpoint

    checkpoint.load(states[0][_PATH], model, list(model.optimizers))


def consolidate(path: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
    """Make a file, as DDP's Trainer writes and reads it, of a directory saved with `state_dict_type="sharded"`. Not collective.

    Raises:
        CheckpointError: the directory is damaged, or was not saved by a Trainer, or the file cannot be written.
    """
    from ...checkpoint.exporting import export
    from ...checkpoint.format.plain import load_plain
    from ...checkpoint.format.reading import open_checkpoint

    with tempfile.TemporaryDirectory(dir=Path(to).parent) as folder:
        whole = Path(folder) / "whole"
        export(open_checkpoint(path), whole)
        saved = load_plain(whole, whole, mapped=True)
        extra = _extra(open_checkpoint(path))
        # The rest is what the user's own run has pickled, as Lightning's files hold it.
        content = {**_unpack(extra[_REST], path, weights_only=False), "state_dict": saved["model"]}
        if extra[_GROUPS]:
            content["optimizer_states"] = _separate(saved["optimizer"], extra[_GROUPS])
        aside = Path(folder) / "file"
        torch.save(content, aside)
        aside.replace(to)


def _extra(opened: Checkpoint) -> dict[str, Any]:
    extra: dict[str, Any] = opened.side_file("extra.pt") or {}
    if _REST not in extra:
        raise CheckpointError(
            f"{opened.path} was not saved by a Trainer of Lightning; zeroopt.checkpoint.load may read it"
        )
    return extra


def _unpack(packed: Tensor, path: str | os.PathLike[str], weights_only: bool | None) -> dict[str, Any]:
    from ...checkpoint.format import plain

    stream = io.BytesIO(packed.numpy().tobytes())
    plain.check_file(stream, f"what Lightning has saved in {os.fspath(path)}")
    rest: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=weights_only)
    return rest


def _read_model(opened: Checkpoint) -> dict[str, Any]:
    """All of it, in memory of this rank."""
    from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    saved, paths = opened.metadata.state_dict_metadata, opened.metadata.planner_data
    keys = [key for key in saved if key.startswith("model.")]
    flat: dict[str, Any] = dict.fromkeys(keys)
    for key in keys:
        entry = saved[key]
        if isinstance(entry, TensorStorageMetadata):
            flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    flat.update(opened.read(flat))
    return unflatten_state_dict(flat, {key: paths[key][1:] for key in keys})


def _separate(optimizers: Mapping[str, Any], numbers_of_groups: Sequence[int]) -> list[dict[str, Any]]:
    """State dicts of several optimizers, each with numbers of its own, of one with all of their groups."""
    groups, separate = iter(optimizers["param_groups"]), []
    for count in numbers_of_groups:
        own = [next(groups) for _ in range(count)]
        numbers = {number: place for place, number in enumerate(n for group in own for n in group["params"])}
        separate.append(
            {
                "state": {numbers[number]: entry for number, entry in optimizers["state"].items() if number in numbers},
                "param_groups": [{**group, "params": [numbers[number] for number in group["params"]]} for group in own],
            }
        )
    return separate


def _is_same(value: Any, other: Any) -> bool:
    """Whether a value of a state dict is what it was: parameters and buffers by their place; what modules make to be saved is made anew
    each time."""
    values, others = tree_flatten(value), tree_flatten(other)
    return values[1] == others[1] and all(map(_is_same_leaf, values[0], others[0]))


def _is_same_leaf(value: Any, other: Any) -> bool:
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return type(value) is type(other) and bool(value == other)
    if value.shape != other.shape or value.dtype != other.dtype:
        return False
    return value.data_ptr() == other.data_ptr() or torch.equal(value, other)
