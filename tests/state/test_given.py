"""State dicts that were given: read one after the other, and what is wrong with them is told when all ranks can hear it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from zeroopt import StateError
from zeroopt.state.given import GivenState


def one(number: int = 0) -> dict[str, Any]:
    return {"state": {0: {"step": number}}, "param_groups": []}


def as_it_is(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    return state_dict


def test_one_state_dict() -> None:
    given, state_dict = GivenState(one(), as_it_is), one()
    assert not given.of_all_ranks and given.layout is None, "plain torch saved it"
    assert list(given.shards()) == [state_dict]


def test_those_of_all_ranks_go_one_by_one() -> None:
    taken: list[int] = []

    def files() -> Iterator[dict[str, Any]]:
        for number in range(3):
            taken.append(number)
            yield one(number)

    given = GivenState(files(), as_it_is)
    assert given.of_all_ranks and taken == [0]
    for number, shard in enumerate(given.shards()):
        assert shard == one(number) and taken == list(range(number + 1)), "each goes before the next one comes"


def test_a_list_of_one_is_of_all_ranks() -> None:
    given = GivenState([one()], as_it_is)
    assert given.of_all_ranks and list(given.shards()) == [one()]


def test_each_is_prepared() -> None:
    given = GivenState([one(1), one(2)], lambda state_dict: {**state_dict, "seen": True})
    assert [shard["seen"] for shard in given.shards()] == [True, True]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected a state dict, or those of all ranks of a run; got none"),
        ({}, r"with 'state' and 'param_groups'; got \[\]"),
        ({"state": {}}, r"got \['state'\]"),
        (dict.fromkeys("abcdefg"), r"got \['a', 'b', 'c', 'd', 'e'\]$"),
        ([[]], "got list"),
        ([None], "got NoneType"),
    ],
)
def test_what_is_wrong_is_kept_until_it_is_read(value: Any, message: str) -> None:
    given = GivenState(value, as_it_is)
    for _ in range(2):
        with pytest.raises(StateError, match=message):
            next(given.shards())


def test_whatever_is_not_even_a_state_dict_is_kept_too() -> None:
    given = GivenState(7, as_it_is)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        next(given.shards())


def test_what_a_hook_raises_is_kept() -> None:
    def refuse(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        raise KeyError("mine")

    given = GivenState(one(), refuse)
    with pytest.raises(KeyError, match="mine"):
        next(given.shards())


def test_a_later_one_that_is_wrong_is_told_when_it_comes() -> None:
    shards = GivenState([one(), {}], as_it_is).shards()
    assert next(shards) == one()
    with pytest.raises(StateError):
        next(shards)


def test_a_layout_that_cannot_be_read_is_told_and_that_of_several_is_not_looked_at() -> None:
    bad = {**one(), "zeroopt": {"format": torch.tensor(-1)}}
    given = GivenState(bad, as_it_is)
    assert given.layout is None
    with pytest.raises(StateError):
        next(given.shards())
    assert list(GivenState([bad], as_it_is).shards()) == [bad]
