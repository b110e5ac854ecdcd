"""Processes that are stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

LOOK_S = 0.01


def go_on_from_stop(process: int) -> None:
    """Continue a process that stops itself. On a busy machine it may come to that when others have lost patience already: wait for it."""
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(LOOK_S)
    os.kill(process, signal.SIGCONT)
