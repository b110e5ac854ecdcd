"""The model of a checkpoint as an ONNX file, for runtimes that know nothing of torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..building.saved import Saved
from ..collectives.lone import lone_group
from ..errors import CheckpointError, ConfigError
from .disk.paths import local_path
from .saved_model import open_saved

ONE_FILE_BYTES = 1 << 30
"""Up to so many bytes, values are in the ONNX file itself, which may have 2 GiB; above, in `<name>.data` beside it."""

Made = tuple[nn.Module, Any] | tuple[nn.Module, Any, Any]
"""A model, what it is called with (a tensor, positional arguments, or a dict of named ones), and, where sizes of these may be others
later, `dynamic_shapes` as torch.export takes them."""


def export_onnx(path: str | os.PathLike[str], to: str | os.PathLike[str], make: Callable[[], Made]) -> None:
    """Give a plain model the values of a checkpoint, and write what its forward does in evaluation as ONNX. Not collective.

    Values are as exact as they were kept, and are converted to the dtypes of the model: float32 for a model that trained in 16 bits,
    if `make` builds it so. Beside the checkpoint's own memory it takes that of the model and of the ONNX file.

    Args:
        path: a checkpoint of zeroopt or DCP, of any number of ranks, or a file of torch.save with a state dict.
        make: builds the model and a sample of its inputs, with torch.onnx.export's conditions: what Python branches on is fixed by
            the sample, and so are all sizes that `dynamic_shapes` does not name.

    Raises:
        ConfigError: `make` returned something else, or there are no packages to export with (onnx, onnxscript).
        CheckpointError: the checkpoint is damaged, or of another model; the file exists, or cannot be written. Nothing is left of
            it then. What torch.onnx.export raises of a model that it cannot translate passes through.
    """
    target = Path(os.path.realpath(local_path(to)))
    parts = (target, target.with_name(f"{target.name}.data"))
    for part in parts:
        if os.path.lexists(part):
            raise CheckpointError(f"{part} exists already. Choose another name, or remove it")
    check_has_exporter()
    model, inputs, dynamic_shapes = _check_made(make())
    read_model(open_saved(path, model), model)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
            _write(model, inputs, dynamic_shapes, Path(aside) / target.name)
            for part in reversed(parts):  # values first: what can be opened is whole
                if (written := Path(aside) / part.name).exists():
                    written.rename(part)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error


def check_has_exporter() -> None:
    """Raises ConfigError where there is not what torch.onnx exports with."""
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"torch.onnx exports with packages that are not installed: pip install {' '.join(missing)}")


def read_model(saved: Saved, model: nn.Module) -> None:
    """Give a model that has memory all that its state dict names, once everything has been looked at.

    Raises:
        CheckpointError: files are damaged; or a name is missing, there is one that the model lacks, or a shape is another. The model
            has not been changed.
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = [name for name in tensors if name not in saved.shapes]
    unexpected = [name for name in saved.shapes if name not in tensors and "_extra_state" not in name.split(".")]
    if missing or unexpected:
        raise CheckpointError(
            f"{saved.place} is of another model: it lacks {_shown(missing)}, and the model lacks {_shown(unexpected)}"
        )
    for name, tensor in tensors.items():
        if saved.shapes[name] != tensor.shape:
            raise CheckpointError(
                f"{name!r} is of shape {list(tensor.shape)} in the model, and of shape {list(saved.shapes[name])} in {saved.place}"
            )
    saved.verify(lone_group())
    for name, tensor in tensors.items():
        saved.read(name, tensor, 0, tensor.numel())


def _shown(names: Sequence[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "nothing"


def _check_made(made: object) -> tuple[nn.Module, Any, Any]:
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise ConfigError(
            "expected a model to export as (module, inputs) or (module, inputs, dynamic_shapes), got "
            + (f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__)
        )
    model, inputs, *dynamic_shapes = made
    return model, inputs, dynamic_shapes[0] if dynamic_shapes else None


def _write(model: nn.Module, inputs: Any, dynamic_shapes: Any, to: Path) -> None:
    named = dict(inputs) if isinstance(inputs, Mapping) else None
    positional = () if named is not None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    torch.onnx.export(
        model.eval(),
        positional,
        to,
        kwargs=named,
        dynamic_shapes=dynamic_shapes,
        external_data=size > ONE_FILE_BYTES,
        dynamo=True,
        verbose=False,
    )
