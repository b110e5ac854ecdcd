"""What ranks hold while they work, as another process sees it: their proportional set sizes, again and again.

The ranks call `wait_to_be_watched`, and the process that has started them meanwhile calls `watch`. They tell each other how far
they are by files beside that of the figures.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bench.launch import Torchrun, write_figures

Held = Callable[[int], int]  # the bytes that a process holds, of one kind or another
Moments = list[tuple[float, list[int]]]  # when (by `time.monotonic`) each rank held how much


def wait_to_be_watched(figures: Path) -> None:
    """Tell the watching process who the ranks are, and return when it has seen what they hold so far. Collective."""
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 0:
        write_figures(pids, pids_beside(figures))
        while not watched_beside(figures).exists():
            time.sleep(0.01)
    dist.barrier()


def end_watch(figures: Path) -> None:
    """From here on nobody looks, which costs time. Collective; without it the watch lasts until there are figures."""
    dist.barrier()
    if dist.get_rank() == 0:
        ended_beside(figures).touch()
    dist.barrier()


def pids_beside(figures: Path) -> Path:
    return figures.with_name("pids.json")


def watched_beside(figures: Path) -> Path:
    return figures.with_name("watched")


def ended_beside(figures: Path) -> Path:
    return figures.with_name("ended")


def watch(torchrun: Torchrun, figures: Path, interval_s: float, held: Held) -> Moments:
    """What each rank holds, first before and then again and again while it trains."""
    while torchrun.poll() is None and not pids_beside(figures).exists():
        time.sleep(interval_s)
    if torchrun.poll() is not None:
        return []
    pids = json.loads(pids_beside(figures).read_text())
    moments = [(time.monotonic(), list(map(held, pids)))]
    watched_beside(figures).touch()
    while torchrun.poll() is None and not figures.exists() and not ended_beside(figures).exists():
        try:
            moments.append((time.monotonic(), list(map(held, pids))))
        except OSError:  # a rank has ended: torchrun will say why
            break
        time.sleep(interval_s)
    return moments


def above_first(moments: Moments) -> list[list[int]]:
    """What each rank held beyond what it held at the first moment, moment by moment."""
    first = moments[0][1]
    return [[now - before for now, before in zip(held, first, strict=True)] for _, held in moments]


def held_bytes(pid: int) -> int:
    """Proportional set size of a process without mapped files."""
    fields = {"Pss_Anon:", "Pss_Shmem:"}
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.split()[0] in fields)
