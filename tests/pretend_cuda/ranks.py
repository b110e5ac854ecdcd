"""Ranks that are threads of this process, each with a pretend device of its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

import _device
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld, WorldData

from . import nccl as _nccl  # noqa: F401 - registers the backend
from .trace import Recording
from .training import Loop

T = TypeVar("T")

TIMEOUT_S = 180.0


class WorldOfDevice(ThreadLocalWorld):
    """What torch.distributed knows, by the rank whose device the calling thread has: hooks run in the threads of autograd."""

    worlds: ClassVar[dict[int, WorldData]] = {}

    def _get_world(self) -> WorldData:
        device = _device.host_of(_device.current_device())
        if device not in self.worlds:
            self.worlds[device] = WorldData(None, {}, {}, {}, {}, 0, {}, {}, {}, [])  # type: ignore[arg-type]
        return self.worlds[device]


@dataclass(frozen=True)
class Rank:
    """Who a thread is.

    Attributes:
        barrier: of all ranks; waiting there tells the devices nothing.
        recording: that all ranks share.
    """

    number: int
    size: int
    barrier: threading.Barrier
    recording: Recording

    @property
    def device(self) -> torch.device:
        """The current one of its threads."""
        return torch.device("cuda", self.number)

    def device_for(self, loop: Loop) -> torch.device:
        """Where a loop trains."""
        return self.other_device if loop.device == "other" else self.device

    @property
    def other_device(self) -> torch.device:
        """A further one of this rank alone."""
        return torch.device("cuda", _device.NUM_DEVICES // 2 + self.number)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what all ranks do within it. Collective."""
        if self.barrier.wait() == 0:
            self.recording.begin()
        self.barrier.wait()
        yield
        if self.barrier.wait() == 0:
            self.recording.end()
        self.barrier.wait()


def on_ranks(size: int, function: Callable[..., T], *args: Any) -> tuple[list[T], Recording]:
    """By rank what a function returns, given its `Rank` and further arguments, and what was recorded.

    Raises what any rank has raised.
    """
    assert size <= _device.NUM_DEVICES // 2
    WorldOfDevice.worlds.clear()
    for number in range(size):
        _device.share_host(_device.NUM_DEVICES // 2 + number, number)
    torch.manual_seed(0)
    store = dist.HashStore()
    barrier, recording = threading.Barrier(size, timeout=TIMEOUT_S), Recording()

    def run(number: int) -> T:
        _device.set_device(number)
        _device.set_stream(number, 0)
        torch.set_num_threads(1)
        timeout = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("cuda:pretend_nccl", store=store, rank=number, world_size=size, timeout=timeout)
        try:
            return function(Rank(number, size, barrier, recording), *args)
        except BaseException:
            barrier.abort()
            raise
        finally:
            dist.destroy_process_group()

    with patch.object(sys, "excepthook", sys.excepthook), ThreadPoolExecutor(size) as pool:  # torch sets another one
        futures = [pool.submit(run, number) for number in range(size)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    recording.abandon()
    # Others may have failed for want of the rank that has failed by itself.
    for error in sorted(
        errors, key=lambda error: "watchdog" in str(error) or isinstance(error, threading.BrokenBarrierError)
    ):
        raise error
    return [future.result() for future in futures], recording


def install() -> None:
    """Let torch.distributed go by devices."""
    dist.distributed_c10d._world = WorldOfDevice()  # type: ignore[assignment]
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # groups of one name, in several threads
