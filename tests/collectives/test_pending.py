"""What has been started is finished once and in order, or fails by the name of those who did not come."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from zeroopt import CollectiveError
from zeroopt.collectives.failure import describe_failure
from zeroopt.collectives.pending import Done, PendingWork, start_message

WHAT = "transport pairwise, all-gather"
LOST = "Connection closed by peer"
TIMED_OUT = "Timed out waiting for recv"


class FakeWork(dist.Work):
    """Comes to its end when it is waited for, or fails."""

    def __init__(self, failure: str = "") -> None:
        super().__init__()
        self.failure = failure
        self.waits: list[timedelta | None] = []

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.waits.append(timeout)
        if self.failure:
            raise RuntimeError(self.failure)
        return True


def pending(*works: FakeWork, keep: Sequence[object] = (), advice: str = "") -> PendingWork:
    """Works that need ranks 0, 1, …"""
    return PendingWork(WHAT, list(enumerate(works)), keep, advice)


def failure_of(work: PendingWork) -> str:
    with pytest.raises(CollectiveError) as raised:
        work.finish()
    return str(raised.value)


def test_what_is_done_has_nothing_to_wait_for() -> None:
    done = Done()
    done.finish()
    done.finish()
    done.wait_until_read()


def test_all_works_are_waited_for_once() -> None:
    works = [FakeWork(), FakeWork(), FakeWork()]
    all_of_them = pending(*works)
    for _ in range(2):
        all_of_them.finish()
    all_of_them.wait_until_read()
    assert [work.waits for work in works] == [[None]] * 3


def test_nothing_to_wait_for_is_finished_too() -> None:
    pending().finish()


def test_what_is_read_or_written_is_kept_until_it_is_finished() -> None:
    tensor = torch.zeros(3)
    kept = weakref.ref(tensor)
    work = pending(FakeWork(), keep=[tensor])
    del tensor
    assert kept() is not None
    work.finish()
    assert kept() is None


def test_a_failure_is_told_with_the_rank_and_again_when_asked_again() -> None:
    first, lost, last = FakeWork(), FakeWork(LOST), FakeWork()
    work = pending(first, lost, last, advice="Bring a friend")
    told = failure_of(work)
    assert told == describe_failure(WHAT, [1], LOST, "Bring a friend")
    assert failure_of(work) == told
    assert (len(first.waits), len(lost.waits)) == (1, 1)


@pytest.mark.parametrize("reason", [TIMED_OUT, LOST])
def test_what_has_not_come_when_another_has_failed_is_given_up_at_once(reason: str) -> None:
    failing, last = FakeWork(reason), FakeWork()
    failure_of(pending(failing, last))
    assert [wait is not None and wait <= timedelta(milliseconds=1) for wait in last.waits] == [True]


@pytest.mark.parametrize(
    ("reasons", "blamed"),
    [
        ([TIMED_OUT, TIMED_OUT, ""], [0, 1]),
        ([TIMED_OUT, "", LOST], [0, 2]),
        ([LOST, TIMED_OUT, ""], [0]),
        ([LOST, TIMED_OUT, LOST], [0, 2]),
        (["", LOST, TIMED_OUT], [1]),
    ],
    ids=str,
)
def test_who_is_merely_not_there_yet_is_blamed_only_for_a_timeout(reasons: list[str], blamed: list[int]) -> None:
    reason = reasons[blamed[0]]
    assert failure_of(pending(*map(FakeWork, reasons))) == describe_failure(WHAT, blamed, reason)


def test_abandoning_goes_through_all_and_raises_nothing() -> None:
    works = [FakeWork(LOST), FakeWork(), FakeWork(TIMED_OUT)]
    pending(*works).abandon()
    assert [len(work.waits) for work in works] == [1, 1, 1]


def test_a_message_that_cannot_be_started_fails_when_it_is_waited_for() -> None:
    def refuse(tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        raise RuntimeError(LOST)

    started = start_message(refuse, torch.zeros(2), 3, 7)
    with pytest.raises(RuntimeError, match=LOST):
        started.wait()
    assert failure_of(PendingWork(WHAT, [(3, started)], ())) == describe_failure(WHAT, [3], LOST)


def test_a_message_is_started_with_all_that_it_needs() -> None:
    work, tensor = FakeWork(), torch.zeros(2)
    heard: list[tuple[list[Tensor], int, int]] = []

    def send(tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        heard.append((tensors, rank, tag))
        return work

    assert start_message(send, tensor, 3, 7) is work
    assert heard == [([tensor], 3, 7)]


@pytest.mark.parametrize("on_device", [False, True])
def test_for_tensors_on_a_device_the_thread_itself_waits(on_device: bool) -> None:
    """For it is the current stream of that thread that has to wait."""
    waited_in: list[threading.Thread] = []

    class Noting(FakeWork):
        def wait(self, timeout: timedelta | None = None) -> bool:
            waited_in.append(threading.current_thread())
            return True

    PendingWork(WHAT, [(1, Noting())], (), on_device=on_device).finish()
    assert (waited_in == [threading.current_thread()]) is on_device
