"""From which runs a checkpoint descends, so that nobody removes those of another run.

A run is one process's training of a wrapped model, from its beginning or from a checkpoint; what goes on from a checkpoint
descends from the run that wrote it, and from those from which that descends.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from ...module import ZeroDataParallel

_NAME_BYTES = 8


def runs_of(model: ZeroDataParallel) -> tuple[str, ...]:
    """The names of the runs from which the state of a model descends, oldest first, and of its own. Not collective: that of the first
    rank counts."""
    if model not in _runs:
        _runs[model] = (secrets.token_hex(_NAME_BYTES),)
    return _runs[model]


def goes_on(model: ZeroDataParallel, runs: Sequence[str]) -> None:
    """Let a model's state descend from that of a checkpoint, which descends from these runs."""
    _runs[model] = (*runs, secrets.token_hex(_NAME_BYTES))


_runs: WeakKeyDictionary[ZeroDataParallel, tuple[str, ...]] = WeakKeyDictionary()
