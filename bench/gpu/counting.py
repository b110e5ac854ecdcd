"""What the host asks of a GPU while a step runs, as torch's profiler and its sync debug mode see it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile, record_function

WINDOW = "the steps that are counted"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")  # how the names begin
COPIES = "cudaMemcpy"
WAIT_WARNING = "called a synchronizing"  # what torch says of each wait in its sync debug mode


@dataclass(frozen=True)
class Calls:
    """Of one step, on the average.

    Attributes:
        launches: kernels.
        waits: of the host for the device.
        copies: between host and device, or on the device.
        wait_places: where torch had the host wait, in one step: file and line, and how many times.
    """

    launches: float
    waits: float
    copies: float
    wait_places: dict[str, int] = field(default_factory=dict)


def count_calls(step: Callable[[], object], steps: int) -> Calls:
    """Run so many steps, and two more. All threads of this process count, on the current device."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()  # what the profiler does first, it does here
        with record_function(WINDOW):
            for _ in range(steps):
                step()
        torch.cuda.synchronize()
    return calls_among(profiler.events() or [], steps, wait_places(step))


def calls_among(events: Iterable[Any], steps: int, places: dict[str, int]) -> Calls:
    """Those of the host that began within `WINDOW`."""
    of_host = [event for event in events if event.device_type == DeviceType.CPU]  # the device has a `WINDOW`, too
    window = next(event.time_range for event in of_host if event.name == WINDOW)
    names = Counter(event.name for event in of_host if window.start <= event.time_range.start < window.end)
    return Calls(
        launches=sum(number for name, number in names.items() if name.startswith(LAUNCHES)) / steps,
        waits=sum(names[name] for name in WAITS) / steps,
        copies=sum(number for name, number in names.items() if name.startswith(COPIES)) / steps,
        wait_places=places,
    )


def wait_places(step: Callable[[], object]) -> dict[str, int]:
    """Where torch makes the host wait in one step. Waits that are not torch's own are not seen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if WAIT_WARNING in str(warning.message)]
    return dict(Counter(f"{shortened(warning.filename)}:{warning.lineno}" for warning in waits))


def shortened(file: str) -> str:
    """A path from the package on."""
    parts = Path(file).parts
    begin = next((index for index, part in enumerate(parts) if part in ("zeroopt", "torch", "bench")), 0)
    return str(Path(*parts[begin:]))
