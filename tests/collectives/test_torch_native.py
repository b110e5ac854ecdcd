"""The backend's own collectives: on which stream they run, which stream waits for which, and how long tensors are kept."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from recorded_streams import RecordedStreams, recorded_streams
from transports import connect
from worker_pool import RunOnRanks

from zeroopt import CollectiveError
from zeroopt.collectives import Transport, torch_native
from zeroopt.collectives.site import Site
from zeroopt.collectives.torch_native import TorchTransport


@contextmanager
def recorded(*, blocks_host: bool) -> Iterator[tuple[RecordedStreams, Transport]]:
    """A transport on streams that are written down."""
    add = torch.add
    with (
        recorded_streams() as streams,
        patch("torch.add", lambda *args, **kwargs: (streams.note("add"), add(*args, **kwargs))),
        patch.object(Site, "blocks_host", blocks_host),
    ):
        yield streams, TorchTransport(dist.group.WORLD, torch.device("cuda"))


def log_streams(*, blocks_host: bool) -> list[list[str]]:
    """What happens between the start of a reduce-scatter with a base and its end, and for an all-gather and a maximum."""
    with recorded(blocks_host=blocks_host) as (streams, transport):
        total, flags = torch.ones(2), torch.ones(2, dtype=torch.uint8)
        logs = []
        for start in (
            lambda: transport.start_reduce_scatter(torch.ones(4), total, total),
            lambda: transport.start_all_gather(torch.ones(4)),
            lambda: transport.start_max(flags, torch.empty_like(flags)),
        ):
            pending = start()
            streams.log.append("started")
            pending.finish()
            pending.finish()
            logs.append(streams.log.copy())
            streams.log.clear()
    assert total.tolist() == [3.0, 3.0]
    return logs


@pytest.mark.parametrize("blocks_host", [True, False])
def test_streams_wait_for_each_other(run_on_ranks: RunOnRanks, blocks_host: bool) -> None:
    """Where the host is not held up, what follows is queued at once."""
    for reduce, *others in run_on_ranks(2, log_streams, blocks_host=blocks_host):
        middle = ["started", "add on side"] if blocks_host else ["add on side", "started"]
        assert reduce == ["side waits for main", *middle, "main waits for side"]
        assert others == [["side waits for main", "started", "main waits for side"]] * 2


def log_readers() -> list[str]:
    """Who waits when a stream finishes what another one has started, and then others do."""
    with recorded(blocks_host=False) as (streams, transport):
        pending = transport.start_all_gather(torch.ones(4))
        streams.log.clear()
        for reader in ("average", "main", "evaluation", "average"):
            streams.log.append(f"{reader} reads")
            with streams.stream(reader):
                pending.finish()
    return streams.log


def test_each_stream_that_finishes_a_collective_waits_and_so_does_that_which_started_it(
    run_on_ranks: RunOnRanks,
) -> None:
    expected = [
        *("average reads", "average waits for side", "main waits for side"),
        *("main reads", "evaluation reads", "evaluation waits for side", "average reads"),
    ]
    assert run_on_ranks(2, log_readers) == [expected] * 2


def tensors_told() -> bool:
    """Whether the allocator hears of the tensors of a collective, which may be dropped before anybody has waited for it."""
    with recorded(blocks_host=False) as (streams, transport):
        tensors = [torch.ones(4), torch.ones(2), torch.ones(2)]
        transport.start_reduce_scatter(*tensors)
    return {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in streams.used_on["side"]}


def test_memory_is_not_given_to_others_before(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, tensors_told) == [True] * 2


def log_reuse() -> list[str]:
    """Who waits when one stream has finished a reduce, and another one writes its buffer."""
    with recorded(blocks_host=False) as (streams, transport):
        pending = transport.start_reduce_scatter(torch.ones(4), torch.empty(2))
        pending.finish()
        streams.log.clear()
        with streams.stream("backward"):
            pending.wait_until_read()
    return streams.log


def test_who_writes_a_buffer_waits_until_it_is_read(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, log_reuse) == [["backward waits for side"]] * 2


def log_capture() -> list[list[str]]:
    """Who waits while a graph is captured: for what was started before, and for what is part of it."""
    with recorded(blocks_host=False) as (streams, transport):
        before = transport.start_all_gather(torch.ones(4))
        streams.log.clear()
        with streams.stream("graph"):
            before.finish()
            logs = [streams.log.copy()]
            streams.log.clear()
            transport.start_all_gather(torch.ones(4)).finish()
        return [*logs, streams.log]


def test_a_graph_waits_for_nothing_outside_of_it(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, log_capture) == [[[], ["side waits for graph", "graph waits for side"]]] * 2


def fail_at_once(start: str) -> str:
    """The message when the backend refuses to start a collective."""
    transport = connect("torch")
    broken = patch.object(torch_native, "all_gather_flat", side_effect=RuntimeError("NCCL communicator was aborted"))
    with broken, pytest.raises(CollectiveError) as raised:
        transport.start_all_gather(torch.ones(4), label=start)
    return str(raised.value)


def test_a_backend_that_refuses_is_told_by_name(run_on_ranks: RunOnRanks) -> None:
    for rank, text in enumerate(run_on_ranks(2, fail_at_once, "bucket 3")):
        assert text == (
            f"transport torch, all-gather of bucket 3: failed for want of rank {1 - rank}: NCCL communicator was aborted"
        )


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
        patch.object(torch_native, "reduce_scatter_flat", on_copies(torch_native.reduce_scatter_flat)),
        patch.object(torch_native, "all_gather_flat", on_copies(torch_native.all_gather_flat)),
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
