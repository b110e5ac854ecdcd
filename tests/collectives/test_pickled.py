"""Tensors that are not on the CPU are found before they are pickled. Those on the meta device stand for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from worker_pool import RunOnRanks

from zeroopt.collectives import ControlGroup
from zeroopt.collectives.control import lone_control
from zeroopt.collectives.pickled import check_on_cpu

WHAT = "comparing notes"


@dataclass(frozen=True)
class Note:
    """Something with a tensor in it."""

    values: Tensor


class Reduced:
    """Has a tensor only when it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Note, (torch.ones(2, device="meta"),)


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda tensor: tensor,
    "list": lambda tensor: [1, [tensor]],
    "tuple": lambda tensor: ("text", (None, tensor)),
    "dict": lambda tensor: {"state": {3: {"step": tensor}}},
    "ordered dict": lambda tensor: OrderedDict(a=tensor),
    "dataclass": Note,
    "parameter": lambda tensor: {"params": [nn.Parameter(tensor)]},
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_tensor_elsewhere_is_found_wherever_it_is(holder: str) -> None:
    with pytest.raises(AssertionError, match=r"comparing notes: .*torch\.float32 of shape \[2\] on meta"):
        check_on_cpu(HOLDERS[holder](torch.ones(2, device="meta")), WHAT)


@pytest.mark.parametrize("holder", HOLDERS)
def test_tensors_on_the_cpu_are_let_through(holder: str) -> None:
    check_on_cpu(HOLDERS[holder](torch.ones(2)), WHAT)


def test_what_an_object_is_pickled_as_counts() -> None:
    with pytest.raises(AssertionError, match="on meta"):
        check_on_cpu([Reduced()], WHAT)


def test_elements_are_not_read() -> None:
    """A tensor of more bytes than there is memory costs nothing."""
    check_on_cpu(torch.zeros(1).expand(1 << 45), WHAT)


def messages() -> list[str]:
    """What each call raises on this rank; none of them has waited for the other rank."""
    control = ControlGroup(dist.group.WORLD)
    elsewhere = torch.ones(2, device="meta")
    calls: list[Callable[[], Any]] = [
        lambda: control.objects(elsewhere, "a"),
        lambda: control.collect([elsewhere], 0, "b"),
        lambda: control.hand_out([elsewhere] * control.size, control.rank, "c"),
        lambda: control.tell({"d": elsewhere}, control.rank, "d"),
    ]
    found = []
    for call in calls:
        with pytest.raises(AssertionError) as error:
            call()
        found.append(str(error.value).partition(":")[0])
    return found


def test_nothing_of_it_is_sent(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, messages) == [["a", "b", "c", "d"]] * 2


def test_a_rank_by_itself_pickles_nothing() -> None:
    elsewhere = torch.ones(2, device="meta")
    assert lone_control().objects(elsewhere, WHAT)[0] is elsewhere
