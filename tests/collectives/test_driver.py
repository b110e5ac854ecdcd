"""The thread that carries collectives on: in order, beside its caller, telling failures, and gone with what it served."""

from __future__ import annotations

import threading
import time

import pytest

from zeroopt.collectives.driver import Driven, Driver, wait_for_unfinished
from zeroopt.errors import CollectiveError

NAME = "zeroopt rounds of a test"  # threads of others may have yet to end


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def test_one_after_the_other_beside_the_caller() -> None:
    driver, gate, order = Driver(), threading.Event(), []

    def first() -> None:
        gate.wait()
        order.append(1)

    one = driver.start(Driven(first))
    two = driver.start(Driven(lambda: order.append(2)))
    assert not one.is_past() and not two.is_past() and order == []
    gate.set()
    two.finish()
    assert one.is_past() and two.is_past() and order == [1, 2]
    one.finish()
    one.wait_until_read()


def test_failures_are_raised_where_results_are_waited_for_each_time() -> None:
    driver = Driver()

    def lose_a_rank() -> None:
        raise CollectiveError("for want of rank 3")

    def go_wrong() -> None:
        raise ZeroDivisionError

    lost, wrong = driver.start(Driven(lose_a_rank)), driver.start(Driven(go_wrong))
    after = driver.start(Driven(lambda: None))
    for _ in range(2):
        with pytest.raises(CollectiveError, match="for want of rank 3"):
            lost.finish()
        with pytest.raises(ZeroDivisionError):
            wrong.wait_until_read()
    after.finish()
    assert after.is_past() and not lost.is_past()


def test_after_one_that_fails_all_others_fail_alike_where_their_order_matters() -> None:
    driver, done = Driver(stops=True), []

    def fail() -> None:
        raise CollectiveError("rank 3 is gone")

    parts = (lambda: done.append(1), fail, lambda: done.append(2))
    before, failing, after = (driver.start(Driven(part)) for part in parts)
    before.finish()
    for driven in (after, failing, after):
        with pytest.raises(CollectiveError, match="rank 3 is gone"):
            driven.finish()
    assert done == [1]


def test_the_thread_ends_with_its_driver() -> None:
    driver = Driver(NAME)
    assert not threads()  # before there is something to do
    driver.start(Driven(lambda: None)).finish()
    (thread,) = threads()
    del driver
    thread.join(300)
    assert not thread.is_alive()


def test_what_waits_at_exit_waits_until_the_last_is_over_or_the_time_is_up() -> None:
    driver, gate = Driver(), threading.Event()
    driver.start(Driven(lambda: None))
    last = driver.start(Driven(lambda: assert_set(gate.wait(300))))
    wait_for_unfinished(time.monotonic())
    assert not last.is_past()
    del driver  # what it was given is done all the same
    gate.set()
    wait_for_unfinished(time.monotonic() + 60)
    assert last.is_past()


def assert_set(is_set: bool) -> None:
    assert is_set
