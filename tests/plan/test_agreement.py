"""All ranks go on, or all of them raise: the same text on each, and a rank's own problem as it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from lone_slice import params_of
from thread_ranks import Exchange, ThreadControl, on_threads, told_on_threads
from torch import nn

from zeroopt import ConfigError, RankMismatchError
from zeroopt.collectives.control import lone_control
from zeroopt.plan.agreement import agree, describe_groups, describe_options, describe_params
from zeroopt.plan.params import Grain

LINES = ["one", "two"]


def outcomes(
    lines: Sequence[Sequence[str]], problems: dict[int, Exception] | None = None, what: str = "testing"
) -> list[str | None]:
    """What `agree` comes to on ranks with these lines: None, or the class and the text of the error."""

    def run(control: ThreadControl) -> None:
        agree([(control, lines[control.rank])], (problems or {}).get(control.rank), what)

    return [None if error is None else f"{type(error).__name__}: {error}" for error in on_threads(len(lines), run)]


@pytest.mark.parametrize("lines", [[], LINES])
def test_ranks_that_have_the_same_go_on_after_one_small_message(lines: list[str]) -> None:
    assert outcomes([lines] * 3) == [None] * 3
    assert told_on_threads(3, lambda control: agree([(control, lines)], None, "testing")) == ["testing"]


@pytest.mark.parametrize("other", [["one", "2"], ["one"], ["one", "two", "three"], [], ["onetwo"], ["two", "one"]])
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_the_first_difference_is_told_on_every_rank(other: list[str], odd: int) -> None:
    lines = [LINES] * 3
    lines[odd] = other
    rank = max(odd, 1)
    here, there = next(
        (a, b) for a, b in zip([*lines[0], "nothing more"], [*lines[rank], "nothing more"], strict=False) if a != b
    )
    told = (
        "RankMismatchError: testing got different things on different ranks; the first difference: rank 0 has "
        f"[{here}], rank {rank} has [{there}]. Build the same model and optimizer, with the same options, on all ranks"
    )
    assert outcomes(lines) == [told] * 3


def test_what_ranks_say_does_not_grow_with_the_lines() -> None:
    """Nothing is longer than a digest, or than two lines."""
    size, lines = 5, [f"line {number} of many" for number in range(5000)]

    def run(control: ThreadControl) -> list[int]:
        mine = [*lines]
        mine[4321] = "another" if control.rank == 3 else mine[4321]
        with pytest.raises(RankMismatchError, match=r"rank 0 has \[line 4321 of many\], rank 3 has \[another\]"):
            agree([(control, mine)], None, "testing")
        return [len(control.exchange.told), max(control.exchange.said_bytes)]

    for told in on_threads(size, run):
        assert isinstance(told, list)
        assert told[0] <= 6 + 13, (
            "that there is a difference, whose, how many lines, those, and log2 of 5,000 questions"
        )
        assert told[1] <= told[0] * 500


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("odd", [0, 1])
def test_each_difference_is_found(size: int, odd: int) -> None:
    lines = [str(number) for number in range(6)]
    for number in range(6):
        others = [lines] * size
        others[odd] = [*lines[:number], "x", *lines[number + 1 :]]
        told = outcomes(others)
        pair = f"[{others[0][number]}], rank {max(odd, 1)} has [{others[max(odd, 1)][number]}]"
        assert told[0] is not None and f"rank 0 has {pair}" in told[0]
        assert told == [told[0]] * size


def test_a_problem_is_raised_where_it_is_and_told_elsewhere() -> None:
    told = "RankMismatchError: testing failed on rank 1: no good"
    assert outcomes([LINES] * 3, {1: ConfigError("no good")}) == [told, "ConfigError: no good", told]


def test_of_several_problems_the_first_is_told_and_each_rank_raises_its_own() -> None:
    lines = [LINES, [], [], []]
    problems: dict[int, Exception] = {1: ConfigError("one"), 3: ValueError("three")}
    told = "RankMismatchError: testing failed on rank 1: one"
    assert outcomes(lines, problems) == [told, "ConfigError: one", told, "ValueError: three"], "problems go first"


def test_a_problem_of_one_group_reaches_the_next() -> None:
    """Rank 1 is in a group with rank 0 and in another one with rank 2."""
    first, second = Exchange(2), Exchange(2)

    def run(control: ThreadControl) -> None:
        in_first = [(ThreadControl(first, control.rank, 2), LINES)] if control.rank < 2 else []
        in_second = [(ThreadControl(second, control.rank - 1, 2), [])] if control.rank > 0 else []
        agree([*in_first, *in_second], ConfigError("no good") if control.rank == 0 else None)

    problem, neighbour, beyond = on_threads(3, run)
    assert isinstance(problem, ConfigError) and str(problem) == "no good"
    for heard in (neighbour, beyond):
        assert isinstance(heard, RankMismatchError)
    assert str(neighbour) == "zeroopt.wrap failed on rank 0: no good"
    assert str(beyond) == f"zeroopt.wrap failed on rank 0: {neighbour}", "rank 0 of that group is rank 1"


def test_a_rank_alone_has_its_own_problems_only() -> None:
    agree([(lone_control(), LINES)], None)
    agree([], None)
    problem = ConfigError("no good")
    for groups in ([(lone_control(), LINES)], []):
        with pytest.raises(ConfigError) as caught:
            agree(groups, problem)
        assert caught.value is problem


def test_what_ranks_have_in_common_of_parameters() -> None:
    plain, conv = params_of(
        torch.zeros(3, 2, dtype=torch.bfloat16),
        torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        group=1,
    )
    matrix = params_of(torch.zeros(3, 2), grain=Grain.MATRIX)[0]
    whole = params_of(torch.zeros(()), grain=Grain.PARAMETER)[0]
    assert describe_params([plain, conv, matrix, whole]) == [
        "parameter 'p0' of shape [3, 2], torch.bfloat16, strides [2, 1], in param_group 1",
        "parameter 'p1' of shape [2, 3, 2, 2], torch.float32, strides [12, 1, 6, 3], in param_group 1",
        "parameter 'p0' of shape [3, 2], torch.float32, strides [2, 1], in param_group 0, stepped as a matrix",
        "parameter 'p0' of shape [], torch.float32, strides [], in param_group 0, stepped whole",
    ]


def test_what_ranks_have_in_common_of_an_optimizer() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.5)
    first, second = describe_groups(optimizer)
    assert first == "optimizer SGD"
    assert second.startswith("param_group 0 with dampening=0, ") and ", lr=0.5, " in second and "params" not in second


def test_options_have_no_addresses_and_no_order() -> None:
    group = {"lr": torch.tensor(0.5), "betas": (0.9, [torch.tensor([1.0])]), "f": lambda: 0, "none": None, "name": "x"}
    described = describe_options([group, {}])
    assert described == [
        "param_group 0 with betas=(0.9, ([1.0])), f=function, lr=0.5, name='x', none=None",
        "param_group 1 with ",
    ]
    turned = dict(reversed(list(group.items())))
    assert describe_options([{**turned, "params": [object()], "param_names": ["p"]}, {}]) == described
    for one, other in combinations(({"a": 1}, {"a": 1.0}, {"a": "1"}, {"b": 1}), 2):
        assert describe_options([one]) != describe_options([other])
