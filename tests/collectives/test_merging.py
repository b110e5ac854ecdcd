"""What ranks know is put together, whoever knows it, and what many know travels once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import ThreadControl, on_threads

from zeroopt.collectives.control import lone_control
from zeroopt.collectives.merging import merge

COUNT = 6


def digest(value: str) -> int:
    return 1 + sum(ord(letter) << 8 * place for place, letter in enumerate(value))


def merged(by_rank: list[dict[int, str]]) -> list[tuple[dict[int, str], list[str], list[int]]]:
    """What each rank has in the end; what has been told, and how many bytes each rank has said."""

    def run(control: ThreadControl) -> tuple[dict[int, str], list[str], list[int]]:
        together = merge(by_rank[control.rank], COUNT, digest, control, "test")
        return together, control.exchange.told, control.exchange.said_bytes

    answers = on_threads(len(by_rank), run)
    return [answer for answer in answers if isinstance(answer, tuple)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, COUNT - 1), st.sampled_from("abc")), min_size=1, max_size=4))
def test_all_ranks_have_what_any_rank_knows(by_rank: list[dict[int, str]]) -> None:
    answers = merged(by_rank)
    assert len(answers) == len(by_rank)
    first = answers[0][0]
    assert all(together == first for together, _, _ in answers)
    assert first.keys() == {number for known in by_rank for number in known}
    assert all(any(known.get(number) == value for known in by_rank) for number, value in first.items())


def test_nothing_travels_that_all_know() -> None:
    """Or that is not there: then one number a thing, else two, and what all lack but one is told once."""
    assert [told for _, told, _ in merged([{}, {}])] == [["test"]] * 2
    assert [told for _, told, _ in merged([{0: "a"}, {1: "a"}])] == [["test"] * 2] * 2
    assert [told for _, told, _ in merged([{0: "a"}, {1: "b", 2: "b"}, {}])] == [["test"] * 4] * 3


def test_what_is_said_does_not_grow_with_the_ranks() -> None:
    few, many = (merged([{rank % COUNT: "alike"} for rank in range(size)])[0][2] for size in (COUNT, 4 * COUNT))
    assert max(many) <= max(few)


def test_a_rank_alone_knows_what_it_knows() -> None:
    known = {1: "a", 4: "b"}
    assert merge(known, COUNT, digest, lone_control(), "test") == known
