"""Schedules that can be told by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zeroopt.simulator.events import Clock, Process, Resource, Signal


def test_time_goes_from_event_to_event_in_the_order_in_which_they_were_asked_for() -> None:
    clock, seen = Clock(), []
    clock.at(2.0, lambda: seen.append(("second", clock.now)))
    clock.at(1.0, lambda: seen.append(("first", clock.now)))
    clock.at(2.0, lambda: seen.append(("third", clock.now)))
    clock.run()
    assert seen == [("first", 1.0), ("second", 2.0), ("third", 2.0)]


def test_a_resource_serves_one_after_the_other() -> None:
    clock = Clock()
    link = Resource(clock)
    ends: dict[str, float] = {}

    def rank() -> Process:
        first, second = link.hold(2.0), link.hold(3.0)
        yield 1.0
        third = link.hold(1.0, then_s=4.0)
        for name, signal in (("first", first), ("second", second), ("third", third)):
            yield signal
            ends[name] = clock.now
        yield 10.0
        fourth = link.hold(0.5)  # idle since 6
        yield fourth
        ends["fourth"] = clock.now

    ended = clock.start(rank())
    assert not ended.has_fired
    clock.run()
    assert ended.has_fired
    assert ends == {"first": 2.0, "second": 5.0, "third": 10.0, "fourth": 20.5}
    assert link.busy_s == 6.5


def test_who_wants_to_be_alone_is_waited_for_to_the_end() -> None:
    clock = Clock()
    link = Resource(clock)
    ends = []
    for alone in (True, False, False):
        link.hold(1.0, then_s=4.0, alone=alone).then(lambda: ends.append(clock.now))
    clock.run()
    assert ends == [5.0, 10.0, 11.0]
    assert link.busy_s == 3.0


def test_processes_wait_for_each_other() -> None:
    clock, seen = Clock(), []
    ready = Signal()

    def waiting(name: str) -> Process:
        yield ready
        seen.append((name, clock.now))
        yield ready  # has come to pass

    def working() -> Process:
        yield 3.0
        ready.fire()

    processes = [waiting("a"), working(), waiting("b")]
    ends = [clock.start(process) for process in processes]
    clock.run()
    assert seen == [("a", 3.0), ("b", 3.0)]
    assert all(end.has_fired for end in ends)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=20))
def test_a_resource_is_never_used_twice_at_a_time_and_never_idle_while_asked(jobs: list[tuple[float, float]]) -> None:
    clock = Clock()
    link = Resource(clock)
    ends = []

    def job(start: float, seconds: float) -> Process:
        yield start
        yield link.hold(seconds)
        ends.append(clock.now)

    for start, seconds in jobs:
        clock.start(job(start, seconds))
    clock.run()
    free_at, expected = 0.0, []
    for start, seconds in sorted(jobs, key=lambda job: job[0]):
        free_at = max(free_at, start) + seconds
        expected.append(free_at)
    assert ends == sorted(ends)
    assert abs(sum(seconds for _, seconds in jobs) - link.busy_s) < 1e-9
    assert abs(max(ends) - max(expected)) < 1e-9
