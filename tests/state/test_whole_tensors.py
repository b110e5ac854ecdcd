"""The state of single parameters is put together on every rank from the segments of all."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from lone_slice import LoneSlice, buckets_of, params_of, values
from state_cases import assert_alike
from thread_ranks import ThreadControl, on_threads, told_on_threads
from torch import Tensor

from zeroopt import ops
from zeroopt.collectives import ControlGroup
from zeroopt.collectives.control import lone_control
from zeroopt.collectives.lone import lone_group
from zeroopt.plan.params import Grain, ManagedParam, ParamState
from zeroopt.state.whole_tensors import whole_states

RANKS = 3
WHOLE = [
    values((70,), 0),
    values((20, 11), 1).t(),
    values((2, 3, 4, 5), 2).contiguous(memory_format=torch.channels_last),
    values((), 3),
]


def entry_of(array: Tensor) -> ParamState:
    """State of every kind, of which the arrays tell which elements they are of."""
    return {
        "step": torch.tensor(3.0),
        "moments": {"mean": array * 2, "square": [array.square(), None]},
        "note": "text",
        "table": torch.ones(1, 2),
    }


def gathered(control: Any, size: int, rank: int, grain: Grain) -> dict[str, ParamState]:
    params = params_of(*WHOLE, grain=grain)
    (bucket,) = buckets_of(params, LoneSlice(size, rank))
    state = {s.shard: entry_of(s.shard.detach().clone()) for s in bucket.segments if s.owner is not params[0]}
    whole = whole_states(state, bucket.segments, params, control)
    return {managed.name: entry for managed, entry in whole.items()}


def expected() -> dict[str, ParamState]:
    return {f"p{i}": entry_of(value) for i, value in enumerate(WHOLE) if i > 0}


@pytest.mark.parametrize("grain", [Grain.ELEMENT, Grain.PARAMETER])
def test_all_ranks_get_what_there_is(grain: Grain) -> None:
    for got in on_threads(RANKS, lambda control: gathered(control, RANKS, control.rank, grain)):
        assert_alike(expected(), got)


def test_a_rank_that_has_everything_asks_nobody() -> None:
    assert_alike(expected(), gathered(lone_control(), 1, 0, Grain.ELEMENT))


def test_what_comes_back_is_a_copy() -> None:
    (managed,) = params_of(torch.zeros(4))
    (bucket,) = buckets_of([managed], LoneSlice())
    (segment,) = bucket.segments
    state: dict[Tensor, ParamState] = {segment.shard: {"step": torch.tensor(1.0), "exp_avg": torch.ones(4)}}
    whole = whole_states(state, bucket.segments, [managed], lone_control())[managed]
    state[segment.shard]["step"] += 1
    state[segment.shard]["exp_avg"] += 1
    assert whole["step"].item() == 1 and whole["exp_avg"].tolist() == [1, 1, 1, 1]


class Noting(ControlGroup):
    """Notes how much memory is sent along."""

    sent: int

    def objects(self, value: Any, what: str) -> list[Any]:
        self.sent = len(pickle.dumps(value))
        return [value]


def test_parts_are_sent_without_the_memory_around_them() -> None:
    params = params_of(torch.zeros(2), torch.zeros(50_000))
    (bucket,) = buckets_of(params, LoneSlice())
    state = {segment.shard: {"exp_avg": segment.part_of(bucket.own_param)} for segment in bucket.segments}
    control = Noting(lone_group())
    whole_states(state, [s for s in bucket.segments if s.owner is params[0]], params, control)
    assert control.sent < 10_000


def quantized(control: ThreadControl, moment: Tensor) -> ParamState:
    (managed,) = params_of(moment)
    (bucket,) = buckets_of([managed], LoneSlice(control.size, control.rank))
    state: dict[Tensor, ParamState] = {}
    for segment in bucket.segments:
        codes = torch.zeros(segment.numel, dtype=torch.int8)
        scales = torch.zeros(ops.num_blocks(segment.numel))
        ops.quantize(segment.shard.detach().clone(), codes, scales)
        state[segment.shard] = {"exp_avg": codes, "exp_avg_scale": scales}
    found: dict[ManagedParam, ParamState] = whole_states(state, bucket.segments, [managed], control)
    return found[managed]


def test_moments_of_8_bits_are_decoded() -> None:
    moment = values((30, 20))
    for entry in on_threads(2, lambda control: quantized(control, moment)):
        assert isinstance(entry, dict) and list(entry) == ["exp_avg"]
        assert entry["exp_avg"].dtype is torch.float32
        torch.testing.assert_close(entry["exp_avg"], moment, rtol=0.1, atol=0.1)


def test_ranks_say_what_they_are_doing_once() -> None:
    told = told_on_threads(2, lambda control: gathered(control, 2, control.rank, Grain.ELEMENT))
    assert told == ["gathering the state of parameters that leave their groups"]
