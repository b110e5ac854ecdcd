"""Ranks that are threads of one process and tell each other things, without a process group: for what takes a `ControlGroup`."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from worker_pool import TIMEOUT_S

from zeroopt.collectives import ControlGroup

T = TypeVar("T")


class Exchange:
    """Where ranks put what they have, and find what the others have.

    Attributes:
        told: what was going on, once each time.
        said_bytes: of each rank, all that it has said so far.
    """

    def __init__(self, size: int) -> None:
        self.told: list[str] = []
        self.said_bytes = [0] * size
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_S)

    def swap(self, rank: int, value: T, what: str) -> list[T]:
        """What all ranks have, by rank."""
        self._values[rank] = value
        self.said_bytes[rank] += len(pickle.dumps(value))
        if self._barrier.wait() == 0:
            self.told.append(what)
        values = list(self._values)
        self._barrier.wait()
        return values

    def leave(self) -> None:
        """Whoever waits for this rank fails."""
        self._barrier.abort()


class ThreadControl(ControlGroup):
    """A rank's view of an `Exchange`. Only what is overridden here works."""

    def __init__(self, exchange: Exchange, rank: int, size: int) -> None:
        super().__init__(dist.ProcessGroup(rank, size))  # type: ignore[call-arg]
        self.exchange = exchange

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def objects(self, value: T, what: str) -> list[T]:
        return self.exchange.swap(self.rank, value, what)

    def tell(self, value: T, source: int, what: str) -> T:
        return self.exchange.swap(self.rank, value if self.rank == source else None, what)[source]  # type: ignore[return-value]

    def total(self, tensor: Tensor, what: str) -> Tensor:
        return tensor.copy_(torch.stack(self.exchange.swap(self.rank, tensor.clone(), what)).sum(0))

    def largest(self, tensor: Tensor, what: str) -> Tensor:
        return tensor.copy_(torch.stack(self.exchange.swap(self.rank, tensor.clone(), what)).amax(0))

    def broadcast(self, tensors: Sequence[Tensor], source: int, what: str) -> None:
        mine = [tensor.detach().clone() for tensor in tensors]
        for tensor, value in zip(tensors, self.exchange.swap(self.rank, mine, what)[source], strict=True):
            tensor.data.copy_(value)


def on_threads(size: int, function: Callable[[ThreadControl], T]) -> list[T | Exception]:
    """By rank what a function returns or raises."""
    exchange = Exchange(size)

    def run(rank: int) -> T | Exception:
        try:
            return function(ThreadControl(exchange, rank, size))
        except Exception as error:
            if isinstance(error, threading.BrokenBarrierError):
                raise
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def told_on_threads(size: int, function: Callable[[ThreadControl], object]) -> list[str]:
    """What the ranks tell each other while they run a function."""
    exchanges = on_threads(size, lambda control: (function(control), control.exchange)[1])
    assert isinstance(exchanges[0], Exchange)
    return exchanges[0].told
