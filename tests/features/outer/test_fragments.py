"""Every fragment has an outer step every so many steps, and whoever sets out arrives before it sets out again."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from zeroopt.features.outer.fragments import Due, Schedule


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    every = draw(st.integers(1, 12))
    return Schedule(every, draw(st.integers(1, 15)), draw(st.integers(0, every - 1)))


@given(schedules())
def test_all_have_their_turn(schedule: Schedule) -> None:
    """One after the other, and what sets out is stepped and arrives in time, in that order."""
    out: dict[int, list[int]] = {fragment: [] for fragment in range(schedule.num_fragments)}
    stepped: dict[int, list[int]] = {fragment: [] for fragment in out}
    there: dict[int, list[int]] = {fragment: [] for fragment in out}
    on_the_way: set[int] = set()
    for step in range(1, 5 * schedule.every + 1):
        due = schedule.due(step)
        for times, fragments in ((out, due.setting_out), (stepped, due.stepping), (there, due.arriving)):
            for fragment in fragments:
                times[fragment].append(step)
        assert not on_the_way & due.setting_out
        on_the_way = (on_the_way | due.setting_out) - due.arriving
        assert schedule.on_the_way(step) == on_the_way
    for fragment, times in out.items():
        assert times[0] <= schedule.every
        assert {later - earlier for earlier, later in pairwise(times)} == {schedule.every}
        for set_out, step, arrived in zip(times, stepped[fragment], there[fragment], strict=False):
            assert set_out <= step <= arrived == set_out + schedule.delay
    # As evenly spread as whole steps are.
    most = -(-schedule.num_fragments // schedule.every)
    assert max(len(schedule.due(step).setting_out) for step in range(schedule.every, 2 * schedule.every)) <= most


def test_as_its_picture_says() -> None:
    schedule = Schedule(6, 3, 2)
    assert [sorted(schedule.due(step).setting_out) for step in range(1, 13)] == [
        *([], [1], [], [2], [], [0]),
        *([], [1], [], [2], [], [0]),
    ]
    assert schedule.due(7) == Due(stepping=frozenset({0}))
    assert schedule.due(8) == Due(setting_out=frozenset({1}), arriving=frozenset({0}))
    assert not Schedule(4).due(3)
    assert Schedule(4).due(4) == Due.at_once(frozenset({0}))
    assert [schedule.fragment_of(bucket) for bucket in range(4)] == [0, 1, 2, 0]
