"""What a process or the loopback interface has used, read from Linux's /proc."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
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


@dataclass
class Peak:
    """The most memory above the level at the start."""

    num_bytes: int = 0


@contextmanager
def peak_pss() -> Iterator[Peak]:
    """Sample this process's memory meanwhile; of pages that several processes map, each has its part."""
    peak, before, done = Peak(), pss_bytes(), threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak.num_bytes = max(peak.num_bytes, pss_bytes() - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def pss_bytes() -> int:
    """Memory of this process that is resident now; a page that n processes map counts for a part of n."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in /proc/self/smaps_rollup")


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
