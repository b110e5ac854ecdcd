"""The ranges of one step in a trace of torch's profiler: the loop's own, zeroopt's, and collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

LOOP = ("forward", "backward", "step")
COLLECTIVES = ("gloo:", "nccl:", "c10d::", "zeroopt::", "FSDP::", "DistributedDataParallel")


@dataclass(frozen=True)
class Range:
    """Milliseconds since the first range of the trace.

    Attributes:
        thread: where it ran, a number as the profiler gives it.
    """

    name: str
    start_ms: float
    end_ms: float
    thread: int


def trace(run: Callable[[], object]) -> list[Range]:
    """What is of interest of a run, in the order of its start."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = [event for event in profiler.events() if event.name in LOOP or event.name.startswith(COLLECTIVES)]
    if not events:
        return []
    begin = min(event.time_range.start for event in events)
    ranges = [
        Range(e.name, (e.time_range.start - begin) / 1e3, (e.time_range.end - begin) / 1e3, e.thread) for e in events
    ]
    return sorted(ranges, key=lambda r: r.start_ms)
