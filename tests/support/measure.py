"""What a process has used, read from Linux's /proc."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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


SAMPLE_S = 0.01  # reading what a process holds takes a few milliseconds itself

Samples = list[tuple[float, int]]  # moments, and bytes above the level at the start


@contextmanager
def sampled_pss() -> Iterator[Samples]:
    """Sample this process's memory meanwhile; of pages that several processes map, each has its part."""
    samples: Samples = []
    before, done = pss_bytes(), threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            samples.append((time.monotonic(), pss_bytes() - before))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        done.set()
        sampler.join()


def peak_of_mean(samples_by_rank: list[Samples]) -> float:
    """The most that processes of one host held together at one moment, by their number.

    Their peaks at different moments would not do: a shared page counts in full for who touches it first.
    """
    latest, peak = [0] * len(samples_by_rank), 0
    merged = sorted((moment, rank, held) for rank, samples in enumerate(samples_by_rank) for moment, held in samples)
    for _, rank, held in merged:
        latest[rank] = held
        peak = max(peak, sum(latest))
    return peak / len(samples_by_rank)


def pss_bytes() -> int:
    """Memory of this process that is resident now; a page that n processes map counts for a part of n."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in /proc/self/smaps_rollup")


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
