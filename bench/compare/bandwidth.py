"""What memory gives to all ranks at once: the two measured numbers of the limit line."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bench.compare.clock import make_clock
from bench.traffic import Stream, same_traffic

TURNS = 7


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second and rank.

    Attributes:
        optimizer: read and written by a loop through the arrays of AdamW.
        copy: copied from one array to another.
    """

    optimizer: float
    copy: float


def measure_bandwidth(numel: int, device: torch.device) -> Bandwidth:
    """With arrays of `numel` float32. Collective: all ranks work at the same time."""
    source, target = torch.ones(numel, device=device), torch.ones(numel, device=device)
    copied = source.nbytes / seconds_of(lambda: target.copy_(source), device)
    if device.type == "cuda":
        return Bandwidth(2 * copied, copied)  # a copy reads and writes
    arrays = [source, target, torch.ones(numel), torch.ones(numel)]
    streams = [Stream(array, mode) for array, mode in zip(arrays, ("r", "rw", "rw", "rw"), strict=True)]
    moved = sum(stream.nbytes for stream in streams)
    return Bandwidth(moved / seconds_of(same_traffic(streams), device), copied)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median of some turns, which ranks begin together."""
    run()
    seconds = []
    for _ in range(TURNS):
        dist.barrier()
        clock = make_clock(device)
        clock.mark()
        run()
        clock.mark()
        seconds += clock.seconds()
    return statistics.median(seconds)
