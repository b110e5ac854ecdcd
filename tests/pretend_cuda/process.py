"""Runs functions in a process that has pretend devices: torch asks for devices once, so the tests' own process has none."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any, TypeVar

from paths import PYTHON_PATH, ROOT

T = TypeVar("T")

START_TIMEOUT_S = 600.0  # the device may have to be compiled
TIMEOUT_S = 240.0


class PretendProcess:
    """Started when it is first needed, and again when it has died or hung."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """What a function of a module returns there. It has to be importable, and what it takes and returns, pickled.

        Raises:
            AssertionError: it has raised, with its traceback; or it has not returned in time, or the process has died.
        """
        if self._process is None:
            self._start()
        self._connection.send_bytes(pickle.dumps((function, args)))  # plainly: tensors as they are
        value: T = self._receive(TIMEOUT_S, function.__name__)
        return value

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, "-m", "tests.pretend_cuda.server", str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self._receive(START_TIMEOUT_S, "the start")

    def _receive(self, timeout: float, what: str) -> Any:
        try:
            if not self._connection.poll(timeout):
                raise AssertionError(f"{what} has not come to its end within {timeout:.0f} s on the pretend device")
            kind, value = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.close()
            raise AssertionError(f"the process of the pretend device died in {what}") from None
        except AssertionError:
            self.close()
            raise
        if kind == "error":
            raise AssertionError(f"{what} has raised on the pretend device:\n{value}")
        return value
