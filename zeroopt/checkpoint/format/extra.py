"""What a user saves besides the model and the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ...errors import CheckpointError

EXTRA = "extra.pt"


def rank_file(rank: int) -> str:
    """Name of the file with what is saved of one rank alone."""
    return f"rank-{rank}.pt"


def pack_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Values by name: of an object with `state_dict()`, that; of everything else, itself."""
    return {name: value.state_dict() if _is_stateful(value) else value for name, value in (extra or {}).items()}


def check_extra(extra: Mapping[str, Any] | None, saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError when something that is to be loaded is not there."""
    missing = [name for name, value in (extra or {}).items() if _is_stateful(value) and name not in saved]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no {missing[0]!r} among its extra values, only {sorted(saved)}: leave it out of extra, or give it "
            "the name that it was saved under"
        )


def unpack_extra(extra: Mapping[str, Any] | None, saved: Mapping[str, Any], undo: ExitStack) -> dict[str, Any]:
    """Load objects that have `load_state_dict()`, and return all that was saved.

    Args:
        undo: when it is closed, they are again as they were before.
    """
    for name, value in (extra or {}).items():
        if _is_stateful(value) and name in saved:
            undo.callback(value.load_state_dict, copy.deepcopy(value.state_dict()))
            value.load_state_dict(saved[name])
    return dict(saved)


def _is_stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
