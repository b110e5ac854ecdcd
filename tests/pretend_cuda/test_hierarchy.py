"""Ranks in levels, and in shard groups: several communicators on one device, and streams within streams."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from transports import hosts
from worker_pool import RunOnRanks

from zeroopt.collectives import Transport, hierarchy
from zeroopt.collectives.replicated import ReplicatedTransport
from zeroopt.collectives.select import connect_transport

from .process import PretendProcess
from .test_training import train_here, train_on_cpu
from .training import BF16, Loop, train

pytestmark = pytest.mark.slow

LEVELS = {"transport": hierarchy(2)}
ALL_OF_IT: dict[str, Any] = {**BF16, "max_grad_norm": 0.1}
OWN_SUMS = {"transport": "all_to_all"}
LOOPS = {
    **{f"levels, stage {stage}": Loop({"stage": stage, **LEVELS}, accumulate=2, ranks=4) for stage in range(3)},
    "levels, no_sync": Loop({"stage": 2, **LEVELS, **ALL_OF_IT}, accumulate=2, no_sync=True, ranks=4, side="branch"),
    "levels, remainders, clipping": Loop(
        {"stage": 1, **LEVELS, **BF16, "master_weights": "remainder"}, clip=0.1, ranks=4
    ),
    "levels, step in backward": Loop({"stage": 2, **LEVELS, "step_in_backward": True}, ranks=4),
    "levels, codes": Loop(  # of layers, which are large enough
        {"stage": 2, **LEVELS, "gradient_compression": "int8", "bucket_mb": 0.02}, width=64, ranks=4
    ),
    "three levels": Loop({"stage": 2, "transport": hierarchy(2, 2), **BF16}, ranks=8),
    **{
        f"shard groups, stage {stage}": Loop({"stage": stage, **OWN_SUMS}, accumulate=2, ranks=4, shard_ranks=2)
        for stage in (1, 2)
    },
    "shard groups, the backend's sums": Loop({"stage": 2}, ranks=4, shard_ranks=2, side="branch"),
    "shard groups, no_sync": Loop(
        {"stage": 2, **OWN_SUMS, **ALL_OF_IT}, accumulate=2, no_sync=True, ranks=4, shard_ranks=2
    ),
    "shard groups, remainders, clipping": Loop(
        {"stage": 1, **OWN_SUMS, **BF16, "master_weights": "remainder"}, clip=0.1, ranks=4, shard_ranks=2
    ),
    "shard groups, step in backward": Loop({"stage": 2, **OWN_SUMS, "step_in_backward": True}, ranks=4, shard_ranks=2),
    "shard groups of levels": Loop({"stage": 2, **LEVELS}, ranks=8, shard_ranks=4),
}
NUM_ORDERS = 100


@pytest.mark.parametrize("name", LOOPS)
def test_trains_as_on_the_cpu_in_any_order(
    name: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks
) -> None:
    loop = LOOPS[name]
    expected = run_on_ranks(loop.ranks, train_on_cpu, loop)
    result = on_pretend_cuda(train_here, loop, NUM_ORDERS)
    assert result["races"] == []
    assert result["at once"] == []
    assert result["wrong orders"] == {}
    for params in result["params"]:
        for param, other in zip(params, expected[0], strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0)


def _train_on_two_hosts() -> dict[str, Any]:
    """By what "auto" takes."""
    with hosts([0, 0, 1, 1]):
        return train_here(Loop({"stage": 2, "transport": "auto"}, ranks=4), 10)


def _transports_on_two_hosts() -> list[str]:
    from .ranks import on_ranks

    with hosts([0, 0, 1, 1]):
        return on_ranks(4, lambda rank: connect_transport("auto", dist.group.WORLD, rank.device).name)[0]


def test_auto_takes_levels_on_several_hosts(on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks) -> None:
    expected = run_on_ranks(4, train_on_cpu, Loop({"stage": 2, **LEVELS}, ranks=4))
    result = on_pretend_cuda(_train_on_two_hosts)
    assert on_pretend_cuda(_transports_on_two_hosts) == ["hierarchy"] * 4
    assert (result["races"], result["wrong orders"]) == ([], {})
    assert all(map(torch.equal, result["params"][0], expected[0]))


def _tell_flags_by_the_way() -> dict[str, Any]:
    """What ranks say of used parameters goes straight to the whole group, while reduces are on their way in parts of it."""
    with patch.object(ReplicatedTransport, "start_max", Transport.start_max):
        return train_here(LOOPS["shard groups, stage 2"], 0)


def test_communicators_that_do_not_take_turns_are_found(on_pretend_cuda: PretendProcess) -> None:
    result = on_pretend_cuda(_tell_flags_by_the_way)
    assert result["races"] == []
    assert result["at once"] and all(pair.count("RedOpType.MAX") == 1 for pair in result["at once"])


FILES = [f"zeroopt/collectives/{name}.py" for name in ("hierarchy", "replicated")]
# The stream across has summed what it then gathers. The wait is there for who gathers anything else.
IMPLIED = "replicated.py go_across > zeroopt/collectives/torch_native.py start_all_gather > zeroopt/collectives/comm_stream.py fall_in"
WAITING = [
    LOOPS["levels, stage 2"],
    LOOPS["levels, no_sync"],
    LOOPS["shard groups, stage 2"],
    LOOPS["shard groups, no_sync"],
]


def _leave_out_each_wait(loop: Loop, known: Collection[str]) -> dict[str, tuple[bool, bool]]:
    """By the lines of each wait that levels and shard groups call for: whether there are races without it, and orders that give other bits.

    Args:
        known: lines that are left alone.
    """
    from .ranks import on_ranks
    from .surface import host_is_ahead
    from .trace import showing

    with host_is_ahead(), showing(12):
        _, recording = on_ranks(loop.ranks, lambda rank: train(loop, rank.number, rank.device, rank.recorded))
    assert not recording.races()
    found = {}
    for place, nodes in recording.waits_by(FILES).items():
        if place not in known and IMPLIED not in re.sub(r":\d+", "", place):
            is_race = bool(recording.races(nodes))
            found[place] = is_race, is_race and recording.has_wrong_order(range(40), nodes)
    return found


def test_each_wait_is_needed(on_pretend_cuda: PretendProcess) -> None:
    seen: set[str] = set()
    raced: set[str] = set()
    wrong: set[str] = set()
    for loop in WAITING:  # once there are other bits, there is nothing more to learn of a wait
        for place, (is_race, is_wrong) in on_pretend_cuda(_leave_out_each_wait, loop, wrong).items():
            seen.add(place)
            raced |= {place} if is_race else set()
            wrong |= {place} if is_wrong else set()
    assert all(any(place.startswith(file) for place in seen) for file in FILES)
    assert seen - raced == set()
    assert seen - wrong == set()
