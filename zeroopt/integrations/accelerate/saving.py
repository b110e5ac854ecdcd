"""Checkpoints of wrapped models: `zeroopt_0`, `zeroopt_1`, … in the folder to which Accelerate writes all else.

Each is one of zeroopt.checkpoint, with the model and the state of its optimizers, of which every rank writes its part. They are
put in place last: a folder without them is one that was not finished.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from ...errors import CheckpointError
from ...module import ZeroDataParallel

_log = logging.getLogger("zeroopt")


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


def load_models(
    folder: Path, models: Sequence[ZeroDataParallel], *, strict: bool = True, trained_only: bool = False
) -> bool:
    """Load their checkpoints. Collective.

    Args:
        strict, trained_only: as for `zeroopt.checkpoint.load`.

    Returns:
        Whether there are any: without zeroopt, Accelerate writes other files.

    Raises:
        CheckpointError: there are as many as for fewer models, or one cannot be loaded.
    """
    paths = _paths(folder, models)
    missing = [path for path in paths if not path.exists()]
    if len(missing) == len(paths):
        return False
    if missing:
        raise CheckpointError(
            f"{folder} holds {len(paths) - len(missing)} of {len(paths)} wrapped models, and not {missing[0].name}: prepare the models "
            "that were saved, in the same order"
        )
    from ...checkpoint import load

    for path, model in zip(paths, models, strict=True):
        load(path, model, list(model.optimizers), strict=strict, trained_only=trained_only)
    return True


def newest_whole(folder: Path, models: Sequence[ZeroDataParallel]) -> Path | None:
    """The last of the numbered checkpoints in a folder that was finished; None where none is zeroopt's."""
    numbered = sorted((int(match[0]), path) for path in folder.iterdir() if (match := re.search(r"\d+$", path.name)))
    for number, (_, path) in enumerate(reversed(numbered)):
        if models and all(one.exists() for one in _paths(path, models)):
            if number > 0:
                _log.warning("%s was not finished, so %s is loaded", numbered[-1][1], path)
            return path
    return None


def _paths(folder: Path, models: Sequence[ZeroDataParallel]) -> list[Path]:
    return [folder / f"zeroopt_{number}" for number in range(len(models))]
