"""What ranks hold while they work, as the process that has started them sees it, again and again."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from bench.launch import Ranks

Held = Callable[[int], int]  # the bytes that a process holds, of one kind or another
Moments = list[tuple[float, list[int]]]  # when (by `time.monotonic`) each rank held how much


class Watch:
    """Goes to the ranks as an argument of their function; they tell by it from when to when they want to be watched."""

    def __init__(self) -> None:
        self._watching_end, self._ranks_end = multiprocessing.Pipe()

    def begin(self) -> None:
        """Return when the watching process has seen what the ranks hold so far. Collective."""
        self._wait_for_a_look("begin")

    def end(self) -> None:
        """Return when it has seen what they hold now, and looks no more. Collective; else it looks until they have returned."""
        self._wait_for_a_look("end")

    def _wait_for_a_look(self, why: str) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            self._ranks_end.send(why)
            self._ranks_end.recv()
        dist.barrier()

    def moments(self, ranks: Ranks, interval_s: float, held: Held) -> Moments:
        """What each rank holds, first when it begins and then again and again. Called by who has started them.

        Raises:
            RankFailed: one of them has failed, or time is up for all.
        """
        moments: Moments = []

        def look() -> None:
            with suppress(OSError):  # a rank has ended, of which `ranks` will tell
                moments.append((time.monotonic(), list(map(held, ranks.pids))))

        while not ranks.have_returned(interval_s):
            if self._watching_end.poll():
                asked = self._watching_end.recv()
                look()
                self._watching_end.send("seen")
                if asked == "end":
                    break
            elif moments:
                look()
        return moments


def above_first(moments: Moments) -> list[list[int]]:
    """What each rank held beyond what it held at the first moment, moment by moment."""
    first = moments[0][1]
    return [[now - before for now, before in zip(held, first, strict=True)] for _, held in moments]


def held_bytes(pid: int) -> int:
    """Memory of a process without mapped files: what it has of its own, and its part of what it shares.

    Pages that it still has in common with the server that it was forked from are its own, for it has had them from the first: the
    proportional set size would grow when it writes to them.
    """
    fields = {"Anonymous:", "Pss_Shmem:"}
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.split()[0] in fields)
