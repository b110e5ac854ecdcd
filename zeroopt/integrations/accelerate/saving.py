"""Checkpoints of wrapped models: `zeroopt_0`, `zeroopt_1`, … in the folder to which Accelerate writes all else.

Each is one of zeroopt.checkpoint, with the model and the state of its optimizers, of which every rank writes its part. They are
put in place last: a folder without them is one that was not finished, unless it was saved without zeroopt. Then models are in
`model.safetensors` or `pytorch_model.bin`, and optimizers in `optimizer.bin`, `optimizer_1.bin`, …, by which it is told: weights alone
are also what `save_model` writes.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from ...errors import CheckpointError
from ...module import ZeroDataParallel

_log = logging.getLogger("zeroopt")

_OURS = re.compile(r"zeroopt_\d+")
_WEIGHTS = re.compile(r"model(_\d+)?\.safetensors|pytorch_model(_\d+)?\.bin")
_OPTIMIZERS = re.compile(r"optimizer(_\d+)?\.bin")


def wrapped_models(models: Iterable[nn.Module]) -> list[ZeroDataParallel]:
    """Those whose optimizers are there, too."""
    return [model for model in models if isinstance(model, ZeroDataParallel) and model.optimizers]


def save_models(folder: Path, models: Sequence[ZeroDataParallel], *, trained_only: bool) -> None:
    """Write their checkpoints. Collective.

    Args:
        trained_only: as for `zeroopt.checkpoint.save`.
    """
    from ...checkpoint import save  # imports torch.distributed.checkpoint, which takes long

    for path, model in zip(_paths(folder, models), models, strict=True):
        save(path, model, list(model.optimizers), trained_only=trained_only)


def remove_former(folder: Path, models: Sequence[ZeroDataParallel]) -> None:
    """Take away what an earlier checkpoint has left in a folder that is written to again, and this one does not replace: models
    beyond these, and what was saved without zeroopt. For one rank to call, before anything is written.
    """
    for path in _named(folder, _OURS):
        if path not in _paths(folder, models):
            shutil.rmtree(path)
    optimizers = _named(folder, _OPTIMIZERS)
    for path in [*optimizers, *_named(folder, _WEIGHTS)] if optimizers else ():
        path.unlink()


def load_models(
    folder: Path,
    models: Sequence[ZeroDataParallel],
    *,
    plain_optimizers: int,
    strict: bool = True,
    trained_only: bool = False,
) -> bool:
    """Load their checkpoints. Collective.

    Args:
        plain_optimizers: how many optimizers there are that zeroopt has not wrapped, for which Accelerate writes files.
        strict, trained_only: as for `zeroopt.checkpoint.load`.

    Returns:
        Whether there are any: without zeroopt, Accelerate writes other files.

    Raises:
        CheckpointError: there are as many as for fewer models or for more, the folder holds what was saved without zeroopt, too,
            or one cannot be loaded.
    """
    paths = _paths(folder, models)
    found = _named(folder, _OURS)
    if len(found) > len(paths):
        raise CheckpointError(
            f"{folder} holds {len(found)} wrapped models, and {len(paths)} are prepared with their optimizers: prepare the models that "
            "were saved, in the same order"
        )
    missing = [path for path in paths if not path.exists()]
    if len(missing) == len(paths):
        return False
    if missing:
        raise CheckpointError(
            f"{folder} holds {len(paths) - len(missing)} of {len(paths)} wrapped models, and not {missing[0].name}: prepare the models "
            "that were saved, in the same order"
        )
    if len(optimizers := _named(folder, _OPTIMIZERS)) > plain_optimizers:
        raise CheckpointError(
            f"{folder} holds two checkpoints, one of zeroopt ({paths[0].name}) and one that was saved without it "
            f"({optimizers[-1].name}): remove zeroopt_*, or else optimizer*.bin with the weights beside it, whichever is older"
        )
    from ...checkpoint import load

    for path, model in zip(paths, models, strict=True):
        load(path, model, list(model.optimizers), strict=strict, trained_only=trained_only)
    return True


def newest_whole(folder: Path, models: Sequence[ZeroDataParallel], optimizers: int) -> Path | None:
    """The last of the numbered checkpoints in a folder that was finished, with zeroopt or without; None where none was.

    Args:
        optimizers: how many there are, wrapped or not.
    """
    numbered = sorted((int(match[0]), path) for path in folder.iterdir() if (match := re.search(r"\d+$", path.name)))
    for number, (_, path) in enumerate(reversed(numbered)):
        if models and (all(one.exists() for one in _paths(path, models)) or _is_plain(path, optimizers)):
            if number > 0:
                _log.warning("%s was not finished, so %s is loaded", numbered[-1][1], path)
            return path
    return None


def _is_plain(folder: Path, optimizers: int) -> bool:
    """Whether it was saved without zeroopt, and finished: Accelerate writes the random state after all models and optimizers."""
    return len(_named(folder, _OPTIMIZERS)) >= optimizers and (folder / "random_states_0.pkl").exists()


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []


def _paths(folder: Path, models: Sequence[ZeroDataParallel]) -> list[Path]:
    return [folder / f"zeroopt_{number}" for number in range(len(models))]
