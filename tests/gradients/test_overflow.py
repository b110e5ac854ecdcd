"""All ranks leave out a step where one has found an overflow, and all hear it where one cannot go on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroopt.collectives.lone import lone_group
from zeroopt.collectives.single import SingleTransport
from zeroopt.errors import StateError
from zeroopt.gradients.overflow import Obstacle, agree_on_overflow

CPU = torch.device("cpu")


class Ranks(SingleTransport):
    """This rank, and what the others have said."""

    def __init__(self, others: Sequence[Tensor] = ()) -> None:
        super().__init__(lone_group())
        self.others = others
        self.said: list[Tensor] = []

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        assert value.dtype is torch.float64
        self.said.append(value)
        return torch.stack([*self.others, value])


def said(*, found: bool = False, scale: float = 0.0, obstacle: Obstacle | None = None) -> Tensor:
    """What a rank tells the others."""
    alone = Ranks()
    try:
        agree_on_overflow(alone, CPU, found=found, scale=scale, obstacle=obstacle)
    except StateError:
        assert obstacle is not None
    return alone.said[0]


def heard(first: Tensor, *, found: bool = False, scale: float = 0.0, obstacle: Obstacle | None = None) -> bool:
    """What the second of two ranks comes to."""
    return agree_on_overflow(Ranks([first]), CPU, found=found, scale=scale, obstacle=obstacle)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([2.0**-20, 1.0, 65536.0, 1 / 3]),
)
def test_one_rank_is_enough_whether_it_knows_its_scale_or_not(ranks: list[tuple[bool, bool]], scale: float) -> None:
    *others, (found, knows) = ranks
    told = [said(found=one, scale=scale if knows else 0.0) for one, knows in others]
    expected = any(found for found, _ in ranks)
    assert agree_on_overflow(Ranks(told), CPU, found=found, scale=scale if knows else 0.0) is expected


def test_different_scales_are_named_on_every_rank() -> None:
    expected = r"different scales \(65536, 32768\): make the GradScaler alike on all ranks"
    with pytest.raises(StateError, match=expected):
        heard(said(scale=65536.0), scale=32768.0)
    with pytest.raises(StateError, match=expected):
        heard(said(scale=65536.0, found=True), scale=32768.0, found=True)


def test_who_does_not_know_its_scale_is_named_so_where_the_others_differ() -> None:
    ranks = Ranks([said(scale=2.0), said(found=True), said(scale=0.5)])
    with pytest.raises(StateError, match=r"different scales \(2, unknown, 0.5, unknown\)"):
        agree_on_overflow(ranks, CPU)


def test_scales_that_float32_cannot_tell_apart_differ() -> None:
    with pytest.raises(StateError, match="different scales"):
        heard(said(scale=1.0), scale=1.0 + 2**-40)


@pytest.mark.parametrize(
    ("obstacle", "message"),
    [
        (Obstacle.NO_GRADIENTS, r"no gradients on some rank.*leave out its unscale_\(\)"),
        (Obstacle.SCALED_PEERS, r"max_grad_norm clips by the norm over all optimizers.*scaler.unscale_ for each"),
    ],
    ids=str,
)
def test_an_obstacle_of_one_rank_stops_all(obstacle: Obstacle, message: str) -> None:
    for found in (False, True):
        with pytest.raises(StateError, match=message):
            heard(said(obstacle=obstacle), found=found, scale=4.0)
        with pytest.raises(StateError, match=message):
            heard(said(found=found, scale=4.0), obstacle=obstacle)


def test_of_two_obstacles_all_ranks_hear_the_same() -> None:
    one, other = Obstacle
    messages = []
    for first, second in ((one, other), (other, one)):
        with pytest.raises(StateError) as raised:
            heard(said(obstacle=first), obstacle=second)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_obstacles_are_no_scales() -> None:
    assert all(math.isinf(obstacle.value) for obstacle in Obstacle)
