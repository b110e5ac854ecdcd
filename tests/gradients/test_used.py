"""All ranks know which parameters any of them has used, and that they are at the same place of the training loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zeroopt.collectives import PendingCollective
from zeroopt.collectives.failure import ADVICE
from zeroopt.errors import CollectiveError
from zeroopt.gradients.used import UsedParams

CPU = torch.device("cpu")


class Board:
    """What ranks of one process have said, by the number of the collective."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.said: list[dict[int, Tensor]] = []

    def transports(self) -> list[Any]:
        return [Transport(self, rank) for rank in range(self.num_ranks)]


class Pending(PendingCollective):
    """The maximum over ranks, once all have spoken."""

    def __init__(self, transport: Transport, said: dict[int, Tensor], out: Tensor) -> None:
        self._transport, self._said, self._out = transport, said, out

    def finish(self) -> None:
        assert len(self._said) == self._transport.board.num_ranks, "would wait for ever"
        self._out.copy_(torch.stack(list(self._said.values())).amax(0))

    def wait_until_read(self) -> None:
        self._transport.log.append("read")


class Transport:
    """As much of one as is needed to agree."""

    name = "board"

    def __init__(self, board: Board, rank: int) -> None:
        self.board = board
        self.control = SimpleNamespace(rank=rank, size=board.num_ranks)
        self.log: list[str] = []
        self._num_started = 0

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.log.append("allocate")
        return torch.zeros(numel, dtype=dtype, device=device)

    def free(self, buffer: Tensor) -> None:
        self.log.append("free")

    def start_max(self, flags: Tensor, out: Tensor, *, label: str) -> PendingCollective:
        if self._num_started == len(self.board.said):
            self.board.said.append({})
        said = self.board.said[self._num_started]
        self._num_started += 1
        said[self.control.rank] = flags.clone()
        return Pending(self, said, out)

    def give_up(self, reason: str) -> None:
        self.log.append(reason)


def ranks(num_ranks: int, count: int) -> tuple[list[UsedParams], list[Any]]:
    transports = Board(num_ranks).transports()
    everyone = [UsedParams(transport) for transport in transports]
    for used in everyone:
        used.first_bucket = "bucket 0 (a … b)"
        used.extend(count, CPU)
    return everyone, transports


def backward(everyone: list[UsedParams], *came: list[int], num_steps: int = 0) -> None:
    for used, own in zip(everyone, came, strict=True):
        used.agree(bytearray(own), num_steps)


def finish(everyone: list[UsedParams]) -> list[list[int]]:
    """What each rank knows then."""
    for used in everyone:
        used.finish()
    return [used.flags.tolist() for used in everyone]


@given(st.data(), st.integers(1, 3), st.integers(0, 5), st.integers(0, 4))
@settings(max_examples=30)
def test_any_use_on_any_rank_in_any_backward_counts(
    data: st.DataObject, num_ranks: int, count: int, num_backwards: int
) -> None:
    everyone, _ = ranks(num_ranks, count)
    flags = st.lists(st.integers(0, 1), min_size=count, max_size=count)
    came = [[data.draw(flags) for _ in range(num_ranks)] for _ in range(num_backwards)]
    for of_ranks in came:
        backward(everyone, *of_ranks)
    expected = [int(any(own[i] for of_ranks in came for own in of_ranks)) for i in range(count)]
    assert finish(everyone) == [expected] * num_ranks
    had = bool(came) and any(map(any, came[-1]))
    assert [used.had_gradients for used in everyone] == [had] * num_ranks


def test_it_is_heard_of_once_and_added_to_what_is_known() -> None:
    everyone, _ = ranks(2, 3)
    backward(everyone, [1, 0, 0], [0, 0, 0])
    assert finish(everyone) == [[1, 0, 0]] * 2
    for used in everyone:
        used.flags.zero_()
    assert finish(everyone) == [[0, 0, 0]] * 2
    backward(everyone, [0, 0, 0], [0, 0, 1])
    assert finish(everyone) == [[0, 0, 1]] * 2


def test_further_parameters_are_unused_at_first() -> None:
    everyone, _ = ranks(2, 2)
    backward(everyone, [0, 1], [0, 0])
    finish(everyone)
    for used in everyone:
        used.extend(1, CPU)
    backward(everyone, [0, 0, 0], [1, 0, 0])
    assert finish(everyone) == [[1, 1, 0]] * 2


def test_those_that_are_left_keep_what_is_known_of_them() -> None:
    everyone, _ = ranks(2, 4)
    backward(everyone, [0, 1, 0, 0], [0, 0, 0, 1])
    finish(everyone)
    for used in everyone:
        used.keep([3, 0], CPU)
    assert finish(everyone) == [[1, 0]] * 2
    backward(everyone, [0, 1], [0, 0])
    assert finish(everyone) == [[1, 1]] * 2


def test_nothing_is_written_while_other_ranks_read_it() -> None:
    (used,), (transport,) = ranks(1, 1)
    used.agree(bytearray([0]), 0)
    assert transport.log == ["allocate"]
    used.agree(bytearray([1]), 0)
    assert transport.log == ["allocate", "read"]
    used.finish()
    used.extend(1, CPU)
    assert transport.log == ["allocate", "read", "read", "free", "allocate"]
    used.keep([0], CPU)
    assert transport.log[5:] == ["free", "allocate"]


def test_ranks_hear_who_goes_on_until_nobody_does() -> None:
    everyone, _ = ranks(2, 1)
    for going_on in ((True, False), (True, True), (False, True), (False, False)):
        for used, goes_on in zip(everyone, going_on, strict=True):
            used.agree(bytearray([1]), 0, goes_on=goes_on)
        for used in everyone:
            used.hear()
        assert [used.others_go_on for used in everyone] == [going_on[1] > going_on[0], going_on[0] > going_on[1]]


def test_whoever_has_begun_the_next_backward_while_others_go_on_gives_up() -> None:
    everyone, transports = ranks(2, 1)
    for goes_on in (True, False):
        for used, is_behind in zip(everyone, (False, True), strict=True):
            used.agree(bytearray([1]), 0, goes_on=goes_on and not is_behind)
    everyone[0].finish()
    with pytest.raises(CollectiveError, match="another one went on with a backward"):
        everyone[1].finish()
    assert transports[1].log[-1] == "ranks have diverged"


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 1), (1, 1)), ((3, 1), (3, 2)), ((2, 2), (3, 1))],
    ids=["a step", "a backward", "both"],
)
def test_ranks_at_different_places_hear_the_same_and_give_up(first: tuple[int, int], second: tuple[int, int]) -> None:
    everyone, transports = ranks(2, 2)
    for used, (num_steps, num_backwards) in zip(everyone, (first, second), strict=True):
        for _ in range(num_backwards - 1):
            used._lockstep.note_backward(num_steps)
        used.agree(bytearray(2), num_steps)
    messages = []
    for used, transport in zip(everyone, transports, strict=True):
        for _ in range(2):
            with pytest.raises(CollectiveError) as raised:
                used.finish()
            messages.append(str(raised.value))
        assert transport.log[-1] == "ranks have diverged"
    assert len(set(messages)) == 1
    assert messages[0].startswith(
        f"transport board: the ranks have diverged: at the end of a backward, rank 0 had taken {first[0]} "
    )
    assert messages[0].endswith(
        f"So the gradients of bucket 0 (a … b) and all that follow belong to different steps. {ADVICE}"
    )
