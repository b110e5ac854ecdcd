"""What a process or the loopback interface has used, read from Linux's /proc."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from worker_pool import TIMEOUT_S, RunOnRanks

T = TypeVar("T")


def rss_bytes() -> int:
    """Memory of this process that is resident now, pages shared with other processes included."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """Highest `rss_bytes` since the process started or since `reset_peak_rss`."""
    return _status_bytes("VmHWM")


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def loopback_bytes() -> int:
    """Bytes received over `lo` so far, by every process of this network namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise RuntimeError("no interface lo in /proc/net/dev")


def run_fresh(
    world_size: int, function: Callable[..., T], *args: Any, timeout: float = TIMEOUT_S, **kwargs: Any
) -> list[T]:
    """Like the fixture `run_on_ranks`, in new workers, whose memory no earlier test has shaped."""
    with closing(RunOnRanks()) as run:
        return run(world_size, function, *args, timeout=timeout, **kwargs)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")
