"""The backend's own collectives: on which stream they run, which stream waits for which, and how long tensors are kept."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from transports import CPU, connect
from worker_pool import RunOnRanks

from zeroopt.collectives import torch_native
from zeroopt.collectives.torch_native import TorchTransport


class RecordedStreams:
    """Stands in for torch.cuda: streams are names, and what happens to them is written down.

    Attributes:
        log: one line each.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self._current = "main"

    def Stream(self) -> str:
        return "side"

    def Event(self) -> RecordedEvent:
        return RecordedEvent(self.log)

    def current_stream(self) -> str:
        return self._current

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def note(self, what: str) -> None:
        self.log.append(f"{what} on {self._current}")


class RecordedEvent:
    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._after = ""

    def record(self, stream: str) -> None:
        self._after = stream

    def wait(self, stream: str) -> None:
        self._log.append(f"{stream} waits for {self._after}")


def log_streams() -> list[list[str]]:
    """What happens between the start of a reduce-scatter with a base and its end, and for an all-gather."""
    streams = RecordedStreams()
    with patch("torch.get_device_module", lambda _: streams):
        transport = TorchTransport(dist.group.WORLD, CPU)
    add = torch.add
    with patch("torch.add", lambda *args, **kwargs: (streams.note("add"), add(*args, **kwargs))):
        total = torch.ones(2)
        reduce = transport.start_reduce_scatter(torch.ones(4), total, total)
        streams.log.append("started")
        reduce.finish()
        reduce.finish()
    assert total.tolist() == [3.0, 3.0]
    logs = [streams.log.copy()]
    streams.log.clear()
    gather = transport.start_all_gather(torch.ones(4))
    streams.log.append("started")
    gather.finish()
    return [*logs, streams.log]


def test_streams_wait_for_each_other(run_on_ranks: RunOnRanks) -> None:
    for reduce, gather in run_on_ranks(2, log_streams):
        assert reduce == ["side waits for main", "started", "add on side", "main waits for side"]
        assert gather == ["side waits for main", "started", "main waits for side"]


def on_copies(collective: Callable[..., dist.Work]) -> Callable[..., dist.Work]:
    """The backend's collective, which leaves it to others to keep the tensors.

    Gloo keeps its own until they have arrived, and one of its threads for a moment longer.
    """
    return lambda out, full, **options: collective(out.clone(), full.clone(), **options)


def keep_tensors() -> list[bool]:
    """Whether a bucket that its owner has dropped still lives: while it travels, and when it has arrived."""
    transport = connect("torch")
    full = torch.ones(4)
    alive = weakref.ref(full)
    with (
        patch.object(torch_native, "_reduce_scatter", on_copies(torch_native._reduce_scatter)),
        patch.object(torch_native, "_all_gather", on_copies(torch_native._all_gather)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")  # torch 2.13 warns of the former names of both collectives
        pending = [transport.start_reduce_scatter(full, torch.empty(2)), transport.start_all_gather(full)]
    del full
    kept = [alive() is not None]
    for collective in pending:
        collective.finish()
    gc.collect()
    return [*kept, alive() is not None]


def test_tensors_are_kept_while_they_travel(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, keep_tensors) == [[True, False]] * 2


def sent_bytes() -> int:
    transport = connect("torch")
    full = torch.ones(6)
    transport.start_reduce_scatter(full, torch.empty(2)).finish()
    transport.start_all_gather(full).finish()
    return transport.sent_bytes


def test_sent_bytes_are_those_of_a_ring(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(3, sent_bytes) == [2 * 6 * 4 * 2 // 3] * 3
