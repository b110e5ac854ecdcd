"""How much memory a rank holds for its training."""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

SMAPS = Path("/proc/self/smaps_rollup")
EVERY_S = 0.01
SHARE = 0.1  # of the time, at most: the more memory a process has mapped, the longer a look takes


class Memory:
    """What this process holds beyond what it held when this was made, at its peak and now. Collective to make.

    On a GPU, torch's allocator counts. On a CPU, memory that ranks share counts in parts (the proportional set size), which has to be
    looked at again and again. That takes time, so it is stopped before steps are timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        rehearse(device)
        dist.barrier()  # pages of libraries count in parts, too, when all ranks have them
        self.before = self.highest = self._read()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.watcher.start()

    def stop_watching(self) -> None:
        self.done.set()
        if self.watcher.is_alive():
            self.watcher.join()
            self.highest = max(self.highest, self._read())

    @property
    def held(self) -> int:
        """Bytes."""
        return self._read() - self.before

    @property
    def peak(self) -> int:
        """Bytes. On a CPU, until watching was stopped."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self.highest - self.before

    def _watch(self) -> None:
        pause = EVERY_S
        while not self.done.wait(pause):
            begun = time.perf_counter()
            self.highest = max(self.highest, self._read())
            pause = max(EVERY_S, (time.perf_counter() - begun) * (1 / SHARE - 1))

    def _read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if SMAPS.exists():
            return int(SMAPS.read_text().split("Pss:")[1].split()[0]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rehearse(device: torch.device) -> None:
    """A step of a tiny model: torch loads libraries at its first one, which no training should answer for."""
    layer = nn.Linear(8, 8, device=device)
    layer(torch.ones(8, 8, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()
