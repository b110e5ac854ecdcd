"""The transport in shared memory: who waits for whom, what a lost or diverged rank leads to, and forked children."""

from __future__ import annotations

import gc
import os
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from short_timeouts import lose_patience
from transports import CPU, connect
from worker_pool import TIMEOUT_S, WORKER_DIED, RankError, RunOnRanks

import zeroopt
from zeroopt import _C
from zeroopt.collectives.shm import ShmTransport


def connect_shm() -> ShmTransport:
    transport = connect("shm")
    assert isinstance(transport, ShmTransport)
    return transport


def meet_late() -> tuple[float, float, bool]:
    """When this rank came to a rendezvous and when it went on, and whether it read a bucket that came before."""
    transport = connect_shm()
    bucket, total = transport.allocate(2, torch.float32, CPU), torch.empty(1)
    if transport.slice_index == 0:
        time.sleep(0.2)
    came = time.monotonic()
    reduce = transport.start_reduce_scatter(bucket, total)
    transport.start_rendezvous("test").finish()
    return came, time.monotonic(), reduce.is_read


def sum_beside_a_base() -> tuple[list[float], bool]:
    """The sum, and whether the base is still held when that is there."""
    transport = connect_shm()
    full, out, base = transport.allocate(4, torch.float32, CPU).fill_(1.0), torch.zeros(2), torch.ones(2)
    kept = weakref.ref(base)
    reduce = transport.start_reduce_scatter(full, out, base)
    del base
    reduce.finish()
    is_held = kept() is not None
    reduce.wait_until_read()
    return out.tolist(), is_held


def test_what_was_read_is_let_go(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, sum_beside_a_base) == [([3.0, 3.0], False)] * 2


def test_rendezvous(run_on_ranks: RunOnRanks) -> None:
    came, went, has_read = zip(*run_on_ranks(2, meet_late), strict=True)
    assert min(went) >= max(came)
    assert has_read == (True, True)


def start_many(count: int) -> list[float]:
    """Collectives of which only the last is finished, and so many that the board has no room for all of their tickets."""
    transport = connect_shm()
    bucket, sums = transport.allocate(transport.num_slices, torch.float32, CPU), torch.zeros(count)
    bucket.fill_(1.0)
    for number in range(count):
        last = transport.start_reduce_scatter(bucket, sums[number : number + 1])
    last.finish()
    return sums.tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_more_collectives_than_the_board_holds(run_on_ranks: RunOnRanks, world_size: int) -> None:
    count = 2 * _C.ShmBoard.CAPACITY + 10
    assert run_on_ranks(world_size, start_many, count) == [[float(world_size)] * count] * world_size


def wait_for_one_another() -> bool:
    """Rank 1 waits for a gather while it has yet to read a bucket that rank 0 wants back before it starts the gather."""
    transport = connect_shm()
    bucket, params = (transport.allocate(2, torch.float32, CPU) for _ in range(2))
    total = torch.empty(1)
    transport.barrier()
    if transport.slice_index == 0:
        time.sleep(0.1)  # rank 1 must not find rank 0's bucket when it starts
        reduce = transport.start_reduce_scatter(bucket, total)
        reduce.finish()
        reduce.wait_until_read()
    else:
        transport.start_reduce_scatter(bucket, total)
    transport.start_all_gather(params).finish()
    return True


def test_a_rank_that_waits_for_a_gather_reads_meanwhile(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, wait_for_one_another) == [True, True]


def error_of(call: Callable[[], object]) -> str:
    """Text of a CollectiveError. The group's timeout is half an hour: who raises has noticed what is wrong."""
    with pytest.raises(zeroopt.CollectiveError) as caught:
        call()
    return str(caught.value)


def lose_rank_1(way: str) -> str | None:
    """What the other ranks hear when rank 1 goes while they wait in a barrier."""
    transport = connect_shm()
    transport.barrier()
    if transport.slice_index != 1:
        return error_of(transport.barrier)
    time.sleep(0.2)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "gives up":
        transport.give_up("test")
    if way == "drops its model":
        del transport
        gc.collect()
    return None


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("killed", "rank 1, whose process has ended"),
        ("gives up", "rank 1, which gave up, dropped its model or came to its end"),
        ("drops its model", "rank 1, which gave up, dropped its model or came to its end"),
    ],
)
def test_a_lost_rank_is_noticed(run_on_ranks: RunOnRanks, way: str, reason: str) -> None:
    outcomes = run_on_ranks.outcomes(3, lose_rank_1, way)
    assert outcomes[1] == (RankError(WORKER_DIED, "killed by SIGKILL") if way == "killed" else None)
    for rank in (0, 2):
        assert outcomes[rank] == f"transport shm, rendezvous of barrier: rank {rank} waits in vain for {reason}"


def lose_two_ranks() -> str | None:
    """Rank 2 wants a bucket back that rank 0 has yet to read, and meanwhile would read the next bucket, which rank 1 has
    yet to post. Neither of them comes."""
    transport = connect_shm()
    buckets = [transport.allocate(3, torch.float32, CPU) for _ in range(2)]
    transport.barrier()
    started = [
        transport.start_reduce_scatter(b, torch.empty(1)) for b in buckets[: 1 if transport.slice_index == 1 else 2]
    ]
    if transport.slice_index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    started[0].finish()
    if transport.slice_index == 1:
        time.sleep(0.2)  # rank 2 shall wait already
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(started[0].wait_until_read)


def test_losing_one_rank_that_posts_and_one_that_reads(run_on_ranks: RunOnRanks) -> None:
    *_, survivor = run_on_ranks.outcomes(3, lose_two_ranks)
    assert isinstance(survivor, str), survivor
    assert survivor.endswith("rank 0, whose process has ended; rank 1, whose process has ended")


def lag_behind(timeout_s: float) -> tuple[str, float] | None:
    """What the other ranks hear, and after how many seconds."""
    transport = ShmTransport(dist.new_group(), range(3))
    lose_patience(timeout_s)
    begin, heard = time.monotonic(), None
    if transport.slice_index != 1:
        heard = error_of(transport.barrier), time.monotonic() - begin
    dist.barrier()  # rank 1 does not leave before
    return heard


def test_a_rank_that_does_not_come(run_on_ranks: RunOnRanks) -> None:
    first, _, third = run_on_ranks(3, lag_behind, 1.5)
    for rank, heard in ((0, first), (2, third)):
        assert heard is not None
        message, seconds = heard
        late = "rank 1, which has not come within the group's timeout of 1.5 s"
        assert f"rank {rank} waits in vain for {late}" in message
        assert seconds >= 1.5


def diverge(numel: int) -> str:
    """Rank 1 is at another bucket than rank 0, which is of `numel` elements. Both have been at bucket 7 before."""
    transport = connect_shm()
    bucket = transport.allocate(4, torch.float32, CPU)
    transport.start_reduce_scatter(bucket, torch.empty(2), label="bucket 7").finish()
    if transport.slice_index == 0:
        reduce = transport.start_reduce_scatter(bucket, torch.empty(2), label="bucket 7")
    else:
        reduce = transport.start_reduce_scatter(bucket[:numel], torch.empty(numel // 2), label="bucket 8")
    return error_of(reduce.finish)


@pytest.mark.parametrize("numel", [2, 4])
def test_ranks_that_diverge(run_on_ranks: RunOnRanks, numel: int) -> None:
    """They say where both are, as far as they have been there, also where two buckets are of one size."""
    for heard, bucket in zip(
        run_on_ranks(2, diverge, numel), ["what this rank has not come to yet", "bucket 8"], strict=True
    ):
        places = f"rank 0 at the reduce-scatter of bucket 7 (16 bytes); rank 1 at the reduce-scatter of {bucket} ({4 * numel} bytes)"
        assert heard.startswith(f"transport shm: the ranks have diverged: {places}. ")


def work_with_children(world_size: int) -> list[float]:
    """Rank 1 forks children that end, in several ways, while the other ranks wait for it."""
    transport = connect_shm()
    bucket, total = transport.allocate(world_size, torch.float32, CPU), torch.empty(1)
    totals = []
    for number in range(3):
        bucket.fill_(number + 1)
        if transport.slice_index == 1:
            child = os.fork()
            if child == 0:
                if number == 1:
                    del transport, bucket
                    gc.collect()
                if number == 2:
                    os.closerange(3, 1000)
                os._exit(0)
            os.waitpid(child, 0)
            time.sleep(0.25)  # the others look whether this rank is alive
        reduce = transport.start_reduce_scatter(bucket, total)
        reduce.finish()
        reduce.wait_until_read()
        totals.append(total.item())
    assert all(transport._is_alive(rank) for rank in range(world_size))
    transport.barrier()
    return totals


@pytest.mark.parametrize("world_size", [2, 3])
def test_children_come_and_go(run_on_ranks: RunOnRanks, world_size: int) -> None:
    expected = [float(world_size * number) for number in (1, 2, 3)]
    assert run_on_ranks(world_size, work_with_children, world_size) == [expected] * world_size


def die_before_a_child(heard: Path) -> str:
    """Rank 1 is killed, while a child of it lives on until the other has heard of it."""
    transport = connect_shm()
    transport.barrier()
    if transport.slice_index == 1:
        if os.fork() == 0:
            wait_for(heard)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        return error_of(transport.barrier)
    finally:
        heard.touch()


def wait_for(path: Path) -> None:
    """Until it is there, but not for ever."""
    end = time.monotonic() + 2 * TIMEOUT_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_child_does_not_stand_in_for_its_rank(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    survivor, _ = run_on_ranks.outcomes(2, die_before_a_child, tmp_path / "heard")
    assert isinstance(survivor, str), survivor
    assert survivor.endswith("rank 1, whose process has ended")
