"""Nobody goes on from a step that did not come to its end: some parameters have been stepped, and others have not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import NonFiniteError, RankMismatchError, StateError
from ..streams import is_capturing

# Raised on all ranks alike, by checks that come before a step or when it is through.
_TOLD_TO_ALL = (NonFiniteError, RankMismatchError)


class StepGuard:
    """Remembers that a step of one of a model's optimizers was broken off, by Ctrl-C, for want of memory or of another rank."""

    def __init__(self) -> None:
        self._broken: dict[int, str] = {}  # by the number of the optimizer: what broke off its step

    @contextmanager
    def changing(self, optimizer: int, device: torch.device) -> Iterator[None]:
        """Within it, a step of the optimizer of that number changes parameters, on this device."""
        is_recorded = is_capturing(
            device
        )  # into a CUDA graph: nothing has run, and a capture that fails leaves no graph
        try:
            yield
        except _TOLD_TO_ALL:
            raise
        except BaseException as error:
            if is_recorded:
                raise
            self._broken[optimizer] = f"{type(error).__name__}: {error}".rstrip(": ")
            raise

    @property
    def is_broken(self) -> bool:
        """Whether a step was broken off, and nothing has been loaded since."""
        return bool(self._broken)

    def check(self) -> None:
        """Raise StateError when a step was broken off."""
        for reason in self._broken.values():
            raise StateError(
                f"a step did not come to its end ({reason}): some parameters and their state have been stepped, and others have "
                "not, so that another step would step some of them twice. Load a checkpoint on all ranks, the model's and the "
                "optimizer's state, or start the job again from one"
            )

    def forget(self, optimizer: int) -> None:
        """The state of that optimizer has been loaded, after the model's."""
        self._broken.pop(optimizer, None)
