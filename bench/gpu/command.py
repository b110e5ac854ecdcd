"""A command that is stopped when its time is up, with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        status: its exit status; None where it was stopped.
        output: what it wrote to stdout and stderr.
    """

    status: int | None
    seconds: float
    output: str

    @property
    def problem(self) -> str | None:
        """Why it has not succeeded, in a line; None where it has."""
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}" if self.status else None


def run_command(command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run it at the root of the repository.

    Args:
        environment: variables beside those of this process.

    Raises:
        OSError: there is no such program.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a process group of its own, by which its ranks end with it
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, status = process.communicate()[0], None
    except BaseException:  # Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(status, time.monotonic() - start, output)
