"""Errands are done in their order, on a thread of their own."""

from __future__ import annotations

import gc
import threading
from threading import Event, Thread

import pytest

from zeroopt import CollectiveError
from zeroopt.collectives.courier import Courier

NAME = "zeroopt test courier"
LONG_S = 60.0


def thread_named(name: str) -> Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == name), None)


def test_errands_are_done_in_order_while_this_thread_is_elsewhere() -> None:
    courier, begins, done = Courier(NAME), Event(), []

    def first() -> None:
        begins.wait(LONG_S)
        done.append(("first", threading.current_thread().name))

    errands = [courier.hand_over(first), courier.hand_over(lambda: done.append(("second", "")))]
    assert done == []
    begins.set()
    errands[1].wait()
    assert done == [("first", NAME), ("second", "")]
    errands[0].wait()


def test_after_one_that_fails_all_others_fail_alike() -> None:
    courier, done = Courier(NAME), []

    def fail() -> None:
        raise CollectiveError("rank 3 is gone")

    before, failing, after = map(courier.hand_over, (lambda: done.append(1), fail, lambda: done.append(2)))
    before.wait()
    for errand in (after, failing, after):
        with pytest.raises(CollectiveError, match="rank 3 is gone"):
            errand.wait()
    assert done == [1]


def test_the_thread_begins_with_the_first_errand_and_ends_with_the_courier() -> None:
    name = "zeroopt test courier of its own"  # threads of other tests may have yet to end
    courier = Courier(name)
    assert thread_named(name) is None
    held = [object()]
    courier.hand_over(lambda: held.clear()).wait()
    thread = thread_named(name)
    assert thread is not None
    del courier
    gc.collect()
    thread.join(LONG_S)
    assert not thread.is_alive()
