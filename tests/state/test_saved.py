"""Collecting this rank's state from state dicts of other layouts, without a process group."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zeroopt.errors import StateError
from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.plan.regions import FlatLayout
from zeroopt.state.layout import ShardLayout
from zeroopt.state.saved import SavedState, positions_of
from zeroopt.state.shard_tensor import ShardTensor
from zeroopt.storage.segment import Segment

SHAPE = [7, 9]
NUMEL = 63
VALUES = torch.arange(float(NUMEL)).view(SHAPE)
LAYOUT = FlatLayout.of(SHAPE, [9, 1])
FACTS = {"stage": 2, "rank": 0, "world_size": 3, "param_dtype": "None", "master_weights": "float32"}


def managed(position: int = 0, dtype: torch.dtype = torch.float32, grain: Grain = Grain.ELEMENT) -> ManagedParam:
    param = ManagedParam("weight", nn.Parameter(torch.zeros(SHAPE, dtype=dtype)), 0, 0, position)
    param.grain = grain
    return param


def collector(
    start: int, stop: int, param: ManagedParam | None = None, live: Mapping[Tensor, Any] | None = None, **rest: Any
) -> tuple[SavedState, Tensor]:
    """For elements of one parameter, and the key of their state."""
    owner = managed() if param is None else param
    shard = nn.Parameter(torch.zeros(stop - start, dtype=owner.param.dtype))
    segment = Segment(owner, start, 0, stop - start, shard, owner.param.dtype)
    options: dict[str, Any] = {"idle": {}, "part": "all", "live": live or {}, "keeps_codes": False, **rest}
    return SavedState([segment], [owner], **options), shard


def dict_of(
    entries: dict[Any, Any], layout: ShardLayout | None = None, names: list[Any] | None = None
) -> dict[str, Any]:
    result: dict[str, Any] = {"state": entries, "param_groups": [{"params": names or [0]}]}
    return result if layout is None else {**result, "zeroopt": layout.to_dict()}


def shard_of(start: int, stop: int, *, plain: bool) -> dict[str, Any]:
    """As it is on its rank, or as it comes from a file; of a rank without a part, an empty entry."""
    ranges = {0: (start, stop)} if start < stop else {}
    layout = ShardLayout(FACTS, 0, shapes={0: SHAPE}, names={0: "weight"}, dtypes={0: "torch.float32"}, ranges=ranges)
    local = VALUES.flatten()[start:stop].clone()
    array = local if plain else ShardTensor(LAYOUT, start, local)
    entry = {"step": torch.tensor(3.0), "nested": [{"mean": array}], "text": "x"}
    return dict_of({0: entry if start < stop else {}}, layout)


@given(st.lists(st.integers(0, NUMEL), max_size=4), st.integers(0, NUMEL - 1), st.data())
def test_any_cuts_give_any_others(cuts: list[int], start: int, data: st.DataObject) -> None:
    stop = data.draw(st.integers(start + 1, NUMEL))
    bounds = sorted([0, *cuts, NUMEL])
    shards = [shard_of(*pair, plain=data.draw(st.booleans())) for pair in itertools.pairwise(bounds)]
    saved, key = collector(start, stop)
    for shard in data.draw(st.permutations(shards)):
        saved.take(shard)
    entry = saved.finish(of_all_ranks=True)[key]
    assert entry["step"] == 3 and entry["text"] == "x"
    assert torch.equal(entry["nested"][0]["mean"], VALUES.flatten()[start:stop])


def test_what_is_taken_is_a_copy() -> None:
    for given_dict in (
        shard_of(0, NUMEL, plain=True),
        dict_of({0: {"step": torch.tensor(1.0), "mean": VALUES.clone()}}),
    ):
        saved, key = collector(5, 20)
        saved.take(given_dict)
        entry = saved.finish()[key]
        for value in given_dict["state"][0].values():
            if isinstance(value, Tensor):
                value.fill_(-1)
        assert entry["step"] > 0


def test_names_for_positions() -> None:
    saved, key = collector(5, 20, managed(position=1))
    given_dict = dict_of({"b": {"mean": VALUES}, "a": {}}, names=["a", "b"])
    saved.take(given_dict)
    assert positions_of(given_dict) == {0, 1}
    assert torch.equal(saved.finish()[key]["mean"], VALUES.flatten()[5:20])


def test_other_memory_formats() -> None:
    """Elements are counted as they lie in the parameter's memory."""
    transposed = nn.Parameter(torch.zeros(9, 7).t())
    saved, key = collector(5, 20, ManagedParam("weight", transposed, 0, 0, 0))
    saved.take(dict_of({0: {"mean": VALUES}}))
    assert torch.equal(saved.finish()[key]["mean"], VALUES.t().flatten()[5:20])


@pytest.mark.parametrize(
    ("live", "saved_in", "expected"),
    [
        (None, None, torch.bfloat16),  # as torch does
        (torch.float32, None, torch.float32),
        (None, "torch.bfloat16", torch.float32),  # of a run with parameters like these
        (None, "torch.float32", torch.bfloat16),
    ],
)
def test_dtypes(live: torch.dtype | None, saved_in: str | None, expected: torch.dtype) -> None:
    owner = managed(dtype=torch.bfloat16)
    saved, key = collector(0, NUMEL, owner)
    if live is not None:
        saved._live = {key: {"mean": torch.zeros(NUMEL, dtype=live)}}
    layout = None
    if saved_in is not None:
        layout = ShardLayout(
            FACTS, 0, shapes={0: SHAPE}, names={0: "weight"}, dtypes={0: saved_in}, ranges={0: (0, NUMEL)}
        )
    saved.take(dict_of({0: {"mean": VALUES, "count": torch.ones(SHAPE, dtype=torch.int64)}}, layout))
    entry = saved.finish()[key]
    assert entry["mean"].dtype is expected and entry["count"].dtype is torch.int64


def test_whole_parameters_keep_state_of_any_shape() -> None:
    saved, key = collector(0, NUMEL, managed(grain=Grain.PARAMETER))
    saved.take(dict_of({0: {"rows": torch.ones(7, 1), "mean": VALUES, "list": [torch.zeros(2), None]}}))
    entry = saved.finish()[key]
    assert entry["rows"].shape == (7, 1) and torch.equal(entry["mean"], VALUES)
    assert entry["list"][0].shape == (2,) and entry["list"][1] is None


def test_idle_parameters() -> None:
    frozen = torch.zeros(3, dtype=torch.bfloat16)
    saved, key = collector(0, NUMEL, idle={1: frozen})
    saved.take(dict_of({0: {}, 1: {"step": torch.tensor(2.0), "sum": torch.ones(3)}}, names=[0, 1]))
    state = saved.finish()
    assert key not in state
    assert state[frozen]["sum"].dtype is torch.bfloat16 and state[frozen]["step"].dtype is torch.float32


def refused(saved: SavedState, *dicts: dict[str, Any], **options: Any) -> str:
    with pytest.raises(StateError) as caught:
        for one in dicts:
            saved.take(one)
        saved.finish(**options)
    return str(caught.value)


def test_gaps() -> None:
    message = refused(collector(5, 40)[0], shard_of(0, 10, plain=True), shard_of(30, NUMEL, plain=False))
    assert message.startswith("the state dict lacks elements 10 to 30 of 'nested.0.mean' of parameter 'weight'")
    message = refused(collector(5, 40)[0], shard_of(0, 0, plain=True))
    assert message.startswith("the state dict holds nothing of parameter 'weight', of which another rank had a part")


@pytest.mark.parametrize(
    ("pairs", "held"),
    [
        ([(0, 10)], "0 to 10"),
        ([(0, 10), (20, 63)], "0 to 10, 20 to 63"),
        ([(0, 20), (10, 63)], "0 to 20, 10 to 63"),
        ([(0, 0)], "none"),
    ],
)
def test_shards_that_are_not_those_of_one_run(pairs: list[tuple[int, int]], held: str) -> None:
    """Although this rank has what it needs, or needs nothing."""
    shards = [shard_of(*pair, plain=True) for pair in pairs]
    message = refused(collector(0, 5)[0], *shards, of_all_ranks=True)
    assert message.startswith(
        f"the state dicts hold elements {held} of parameter 'weight' of 63: they are not those of all"
    )


def test_shapes_of_parameters_of_other_ranks() -> None:
    other = ManagedParam("bias", nn.Parameter(torch.zeros(4)), 1, 0, 1)
    saved, _ = collector(0, 5)
    saved._params[1] = other
    message = refused(saved, dict_of({1: {"mean": torch.zeros(3)}}, names=[0, 1]))
    assert message == "the state dict has 'mean' of shape [3] for parameter 'bias' of shape [4]"
