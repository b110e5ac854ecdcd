"""What ranks tell each other, by their rank in the group; and how it is told that one of them does not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from short_timeouts import lose_patience
from worker_pool import WORKER_DIED, RunOnRanks

from zeroopt import CollectiveError
from zeroopt.collectives import ControlGroup, lost
from zeroopt.collectives.control import lone_control, tree_links

WHAT = "comparing notes"
NEVER_S = 600.0  # a timeout that no test lives to see


def receive(control: ControlGroup, source: int) -> list[float]:
    message = torch.zeros(2, dtype=torch.bfloat16)
    control.receive(message, source, WHAT)
    return message.tolist()


def broadcast(control: ControlGroup, source: int) -> list[list[float]]:
    """Several of one dtype, of which one is not contiguous, and one by itself."""
    tensors = [
        torch.full((2, 3), float(control.rank)).t(),
        torch.full((2,), 10.0 + control.rank),
        torch.full((1,), 20 + control.rank),
    ]
    control.broadcast(tensors, source, WHAT)
    return [tensor.flatten().tolist() for tensor in tensors]


def start_broadcast(control: ControlGroup, source: int) -> list[int]:
    tensor = torch.tensor([control.rank])
    control.start_broadcast(tensor, source, WHAT).finish()
    return tensor.tolist()


def start(control: ControlGroup, method: str) -> list[int]:
    tensor = torch.tensor([control.rank + 1])
    getattr(control, method)(tensor, WHAT).finish()
    return tensor.tolist()


# What every rank calls. `other` is a rank of the group that the first one needs.
CALLS: dict[str, Callable[[ControlGroup, int], Any]] = {
    "gather": lambda control, other: control.gather(torch.tensor([control.rank, 7]), WHAT).tolist(),
    "numbers": lambda control, other: control.numbers([control.rank, -(2**62)], WHAT),
    "objects": lambda control, other: control.objects({"rank": control.rank}, WHAT),
    "collect": lambda control, other: control.collect(f"rank {control.rank}", 0, WHAT),
    "hand_out": lambda control, other: control.hand_out(
        list(range(10, 10 + control.size)) if control.rank == other else None, other, WHAT
    ),
    "tell": lambda control, other: control.tell(f"rank {control.rank}", other, WHAT),
    "total": lambda control, other: control.total(torch.tensor(control.rank + 1), WHAT).tolist(),
    "largest": lambda control, other: control.largest(torch.tensor(control.rank + 1), WHAT).tolist(),
    "first": lambda control, other: control.first(control.rank == other, WHAT),
    "start_total": lambda control, other: start(control, "start_total"),
    "start_largest": lambda control, other: start(control, "start_largest"),
    "broadcast": broadcast,
    "start_broadcast": start_broadcast,
    "barrier": lambda control, other: control.barrier(WHAT),
}
MESSAGES: dict[str, Callable[[ControlGroup, int], Any]] = {
    "send": lambda control, other: control.send(torch.zeros(1 << 20), [other], WHAT),
    "receive": receive,
}


def tell_in_a_group_of_two() -> dict[str, Any] | None:
    """What each call comes to on this rank, in a group in which ranks 1 and 2 of the job are 0 and 1."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    control = ControlGroup(group)
    told = {name: call(control, 1) for name, call in CALLS.items()}
    if control.rank == 1:
        control.send(torch.tensor([0.5, -2.0], dtype=torch.bfloat16), [0], WHAT)
        control.send(torch.zeros(0), [0], WHAT)  # nobody has to receive nothing
        return told
    return told | {"receive": receive(control, 1)}


def test_ranks_of_a_group_tell_each_other(run_on_ranks: RunOnRanks) -> None:
    _, first, second = run_on_ranks(3, tell_in_a_group_of_two)
    alike = {
        "gather": [[0, 7], [1, 7]],
        "numbers": [[0, -(2**62)], [1, -(2**62)]],
        "objects": [{"rank": 0}, {"rank": 1}],
        "tell": "rank 1",
        "first": 1,
        "total": 3,
        "largest": 2,
        "start_total": [3],
        "start_largest": [2],
        "broadcast": [[1.0] * 6, [11.0] * 2, [21]],
        "start_broadcast": [1],
        "barrier": None,
    }
    assert first == alike | {"collect": ["rank 0", "rank 1"], "hand_out": 10, "receive": [0.5, -2.0]}
    assert second == alike | {"collect": None, "hand_out": 11}


def pass_on(ranks: list[int]) -> list[float]:
    tensor = torch.tensor([float(dist.get_rank())])
    if dist.get_rank() in ranks:
        ControlGroup(dist.group.WORLD).pass_on(tensor, ranks, WHAT)
    return tensor.tolist()


def test_what_one_rank_has_is_passed_on(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(4, pass_on, [2, 0, 3]) == [[2.0], [1.0], [2.0], [2.0]]


@pytest.mark.parametrize("size", [*range(1, 18), 1250])
def test_everyone_is_in_the_tree_once_and_near_its_root(size: int) -> None:
    links = [tree_links(place, size) for place in range(size)]
    assert links[0][0] is None
    assert sorted(target for _, targets in links for target in targets) == list(range(1, size))
    rounds = [0] * size  # when each has it, where a message takes one
    for place, (_, targets) in enumerate(links):
        for turn, target in enumerate(targets, start=1):
            assert links[target][0] == place < target
            rounds[target] = rounds[place] + turn
    assert max(rounds) == (size - 1).bit_length()


def test_a_rank_alone_needs_no_backend() -> None:
    assert not dist.is_initialized()
    control = lone_control()
    assert (control.rank, control.size, control.device) == (0, 1, torch.device("cpu"))
    assert {name: call(control, 0) for name, call in CALLS.items()} == {
        "gather": [[0, 7]],
        "numbers": [[0, -(2**62)]],
        "objects": [{"rank": 0}],
        "collect": ["rank 0"],
        "hand_out": 10,
        "tell": "rank 0",
        "first": 0,
        "total": 1,
        "largest": 1,
        "start_total": [1],
        "start_largest": [1],
        "broadcast": [[0.0] * 6, [10.0] * 2, [20]],
        "start_broadcast": [0],
        "barrier": None,
    }


def errors_without_rank_1(timeout_s: float, *, dies: bool) -> dict[str, str]:
    """What rank 0 hears of each call, in a group of its own, when rank 1 is not there."""
    groups = {name: dist.new_group() for name in CALLS | MESSAGES}
    lose_patience(timeout_s)
    if dist.get_rank() == 1:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}
    errors = {}
    for name, call in (CALLS | MESSAGES).items():
        with pytest.raises(CollectiveError) as raised:
            call(ControlGroup(groups[name], advice="Bring a friend"), 1)
        errors[name] = str(raised.value)
    return errors


def test_who_does_not_come_is_named(run_on_ranks: RunOnRanks) -> None:
    errors, _ = run_on_ranks(2, errors_without_rank_1, 0.2, dies=False)
    for name, error in errors.items():
        assert error.startswith(f"{WHAT}: failed for want of rank 1: "), name
        assert "Unless they are stopped or busy, the ranks have diverged" in error, name
    assert {name for name, error in errors.items() if error.endswith(". Bring a friend")} == {*CALLS, *MESSAGES}


def test_who_dies_is_named_at_once(run_on_ranks: RunOnRanks) -> None:
    errors, died = run_on_ranks.outcomes(2, errors_without_rank_1, NEVER_S, dies=True)
    assert died.type_name == WORKER_DIED
    assert isinstance(errors, dict)
    for name, error in errors.items():
        assert error.startswith(f"{WHAT}: failed for want of rank 1: "), name


def errors_without_rank_3(
    timeout_s: float, names: Sequence[str], *, dies: bool, grace_s: float = 0.1
) -> dict[str, str]:
    """What the others hear of some calls, each in a group of its own."""
    groups = {name: dist.new_group() for name in names}
    for group in groups.values():  # nobody is missing so far
        ControlGroup(group).barrier(WHAT)
    lose_patience(timeout_s)
    if dist.get_rank() == 3:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}
    errors = {}
    with patch.object(lost, "_GRACE_S", grace_s):
        for name, group in groups.items():
            with pytest.raises(CollectiveError) as raised:
                CALLS[name](ControlGroup(group), 3)
            errors[name] = str(raised.value)
    return errors


NEED_ALL = ["gather", "objects", "hand_out", "tell", "total", "barrier"]


def check_only_rank_3_is_named(errors: object) -> None:
    assert isinstance(errors, dict), errors
    for name, error in errors.items():
        assert error.startswith(f"{WHAT}: failed for want of rank 3: "), (name, error)


def test_of_several_the_one_that_dies_is_named(run_on_ranks: RunOnRanks) -> None:
    """Also by those that wait for others, which have given up for want of it."""
    for errors in run_on_ranks.outcomes(4, errors_without_rank_3, NEVER_S, NEED_ALL, dies=True)[:3]:
        check_only_rank_3_is_named(errors)


def test_of_several_the_one_that_does_not_come_is_named(run_on_ranks: RunOnRanks) -> None:
    # Whoever of the others is slower than the grace would be named, too.
    for errors in run_on_ranks(4, errors_without_rank_3, 1.0, ["gather", "barrier"], dies=False, grace_s=1.0)[:3]:
        check_only_rank_3_is_named(errors)
