"""`StopRequest`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ..collectives import ControlGroup
from ..collectives.lone import default_group
from ..errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self


class StopRequest:
    """Signals by which a cluster announces that it will stop this process, noted and answered by all ranks between two steps.

        with StopRequest() as stop:
            for batch in loader:
                ...
                optimizer.step()
                if stop.came():
                    zeroopt.checkpoint.save(f"runs/step-{step}", model, optimizer, …)
                    break

    A signal that comes while it is in force does nothing else: no step and no save is interrupted. At its end the handlers that were
    there are again.

    Args:
        signals: SIGTERM is what Kubernetes, SLURM and torchrun send before they kill; SIGUSR1 is what is often asked of SLURM.
        process_group: ranks that stop together: all ranks when None.

    Raises:
        ConfigError: not in the main thread, where alone Python handles signals.
        StateError: there are other processes, and no process group.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1),
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("StopRequest has to be made in the main thread, where alone Python handles signals")
        self._control = ControlGroup(default_group() if process_group is None else process_group)
        self._came_here = False
        self._before: dict[signal.Signals, Any] = {one: signal.signal(one, self._note) for one in signals}

    def came(self) -> bool:
        """Whether some rank has had a signal: the same on all ranks, so that all save together.

        Collective: all ranks call it after the same step. It takes one small all-reduce; where steps take a few milliseconds, ask after
        every tenth.
        """
        return self._control.first(self._came_here, "asking whether to stop") is not None

    def close(self) -> None:
        """Put back the handlers that were there before."""
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._came_here = True
