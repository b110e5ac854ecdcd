"""What a backend has been told is kept until it is through, and no longer."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from zeroopt.collectives.messages import Messages, exit_deadline
from zeroopt.collectives.pending import PendingWork

LOST = "Connection closed by peer"


class FakeWork(dist.Work):
    """Comes, or fails, when it may."""

    def __init__(self, failure: str = "") -> None:
        super().__init__()
        self.may_come = threading.Event()
        self.failure = failure
        self.waits: list[timedelta | None] = []

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.waits.append(timeout)
        if timeout is None:
            self.may_come.wait(300)
        if self.failure:
            raise RuntimeError(self.failure)
        return True


def come(*works: FakeWork) -> None:
    for work in works:
        work.may_come.set()


def wait_until_gone(kept: weakref.ref[torch.Tensor]) -> None:
    """A thread has yet to come to it."""
    deadline = time.monotonic() + 300
    while kept() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_nobody_finishes_is_freed_when_it_has_come() -> None:
    """Also behind something that fails."""
    failing, work, tensor = FakeWork(LOST), FakeWork(), torch.zeros(3)
    kept = weakref.ref(tensor)
    PendingWork("a dropped model", [(1, failing)], ())
    PendingWork("a dropped model", [(1, work)], (tensor,))
    del tensor
    assert kept() is not None
    come(failing, work)
    wait_until_gone(kept)
    assert work.waits == [None] and failing.waits == [None]


def test_what_has_failed_is_freed() -> None:
    failing, tensor = FakeWork(LOST), torch.zeros(3)
    kept = weakref.ref(tensor)
    messages = Messages([(1, failing)], (tensor,))
    del tensor
    come(failing)
    for _ in range(2):
        failed = messages.wait()
        assert failed is not None and failed[0] == 1 and str(failed[1]) == LOST
    assert kept() is not None and messages in Messages.unfinished
    assert messages.give_up() == []
    assert kept() is None and messages not in Messages.unfinished and failing.waits == [None]


def test_a_timeout_is_told_to_messages_alone() -> None:
    message, collective = FakeWork(), FakeWork()
    come(message, collective)
    Messages([(1, message), (None, collective)], ()).wait(timedelta(seconds=7))
    assert (message.waits, collective.waits) == ([timedelta(seconds=7)], [None])


def test_two_may_wait_for_the_same() -> None:
    """As after a wait from which a signal has called away."""
    works = [FakeWork(), FakeWork()]
    messages = Messages([(1, work) for work in works], ())
    threads = [threading.Thread(target=messages.wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    come(*works)
    for thread in threads:
        thread.join()
    assert [work.waits for work in works] == [[None], [None]] and messages.is_over


def test_at_exit_what_has_not_come_in_time_is_given_up() -> None:
    works = [FakeWork(), FakeWork(LOST)]
    messages = Messages([(1, work) for work in works], ())
    messages.end_by(deadline=0.0)
    assert [work.waits for work in works] == [[timedelta(milliseconds=1)]] * 2
    assert messages not in Messages.unfinished


def test_at_exit_nobody_waits_for_what_has_failed() -> None:
    failing, work = FakeWork(LOST), FakeWork()
    messages = Messages([(1, failing), (2, work)], ())
    come(failing)
    messages.wait()
    messages.give_up()
    assert messages not in Messages.unfinished


@pytest.mark.parametrize("failed", [False, True])
def test_only_a_process_that_has_not_failed_waits_for_others_when_it_ends(failed: bool) -> None:
    """Python notes the exception by which it ends."""
    with patch.object(sys, "last_value", RuntimeError() if failed else None, create=True):
        assert (exit_deadline() <= time.monotonic()) is failed
