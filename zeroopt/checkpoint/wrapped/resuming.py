"""`resume`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from ...module import ZeroDataParallel
from ..disk.siblings import latest
from ..format.together import together
from .loading import load
from .saving import Optimizers, begin


def resume(
    root: str | os.PathLike[str],
    model: ZeroDataParallel,
    optimizer: Optimizers | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    names: str = "*",
    rank_extra: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    strict: bool = True,
    trained_only: bool = False,
) -> dict[str, Any]:
    """Load the newest whole checkpoint of a directory; where there is none, as at the first start, change nothing.

    Rank 0 looks for it, and all load the same one, whatever is written or removed meanwhile.

    Collective: every rank of the process group must call it.

    Args:
        root, names: as for `latest`.
        model, optimizer, extra, rank_extra, process_group, strict, trained_only: as for `load`.

    Returns:
        As `load`; an empty dict where there is no checkpoint. `resume(…).get("step", 0)` serves both.

    Raises:
        CheckpointError, CollectiveError, StateError: as `latest` and `load`, on all ranks.
    """
    group = begin(model, process_group)
    newest = together(
        group,
        f"looking for checkpoints in {root}",
        lambda: None,
        lambda everyone: [latest(root, names)] * len(everyone),
    )
    if newest is None:
        return {}
    return load(
        newest,
        model,
        optimizer,
        extra,
        rank_extra=rank_extra,
        process_group=process_group,
        strict=strict,
        trained_only=trained_only,
    )
