"""Moments of a step: by the processor's clock, or by events of a CUDA stream, which is where the work then happens."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Clock(Protocol):
    """One for each step."""

    def mark(self) -> None: ...

    def seconds(self) -> list[float]:
        """From each mark to the next; waits for the device."""
        ...


class CpuClock:
    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]


class CudaClock:
    def __init__(self) -> None:
        self.marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        self.marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(self.marks, self.marks[1:], strict=False)]


def make_clock(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else CpuClock()
