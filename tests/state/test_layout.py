"""What a state dict says of itself comes back from a file, and other formats are told apart."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from zeroopt.errors import StateError
from zeroopt.plan.params import ManagedParam
from zeroopt.state.layout import FORMAT, ShardLayout, describe_layout
from zeroopt.state.shard_tensor import OwnTensor

FACTS: dict[str, Any] = {
    "stage": 2,
    "rank": 1,
    "world_size": 3,
    "param_dtype": "None",
    "master_weights": "float32",
    "state_dtype": "torch.float32",
}
SHARD = ShardLayout(
    FACTS,
    seed=2**62 + 1,
    steps_since_average=3,
    part="all",
    order=[[1, 0], [2]],
    shapes={0: [3, 4], 1: [], 2: [0]},
    names={0: "a.weight", 1: "a.scale", 2: "empty"},
    dtypes={0: "torch.float32", 1: "torch.bfloat16", 2: "torch.float32"},
    ranges={0: (5, 12)},
)


def test_a_shards_layout_comes_back() -> None:
    given = {"state": {}, "param_groups": [], "zeroopt": SHARD.to_dict()}
    assert isinstance(given["zeroopt"]["ranges"], OwnTensor)
    assert ShardLayout.of(given) == SHARD and SHARD.is_shard
    file = io.BytesIO()
    torch.save(given, file)
    file.seek(0)
    assert ShardLayout.of(torch.load(file, weights_only=True)) == SHARD


@pytest.mark.parametrize("ranges", [{}, {0: (0, 12), 1: (0, 1)}])
def test_ranks_with_nothing_or_all(ranges: dict[int, tuple[int, int]]) -> None:
    layout = replace(SHARD, ranges=ranges)
    assert ShardLayout.of({"zeroopt": layout.to_dict()}) == layout


def test_keys_are_alike_on_all_ranks() -> None:
    """As torch.distributed.checkpoint needs them."""
    assert SHARD.to_dict().keys() == replace(SHARD, ranges={}).to_dict().keys()
    alone = ShardLayout(FACTS, 0)
    assert alone.to_dict().keys() == SHARD.to_dict().keys()


def test_a_whole_dicts_layout_comes_back() -> None:
    facts = {name: value for name, value in FACTS.items() if name != "rank"}
    whole = ShardLayout(facts, seed=7, order=[], beyond_torch={0: {"step": torch.tensor(1.0)}})
    again = ShardLayout.of({"zeroopt": whole.to_whole_dict()})
    assert again == whole and not whole.is_shard


def test_before_the_first_step_it_has_masters() -> None:
    layout = replace(SHARD, beyond_torch={0: {"remainder": torch.ones(7, dtype=torch.int16)}, 1: {}, 2: {}})
    again = ShardLayout.of({"zeroopt": layout.to_dict()})
    assert again is not None and again.beyond_torch == layout.beyond_torch


def test_plain_torch_has_none() -> None:
    assert ShardLayout.of({"state": {}, "param_groups": []}) is None


@pytest.mark.parametrize("number", [4, FORMAT + 1, None])
def test_another_format_is_refused(number: int | None) -> None:
    saved = {**SHARD.to_dict(), "format": number}
    with pytest.raises(StateError, match=f"expected a state dict of format 5 or 6, got {number}: .* full_state_dict"):
        ShardLayout.of({"zeroopt": saved})


def test_the_format_before_is_read() -> None:
    saved = {**SHARD.to_dict(), "format": 5}
    assert ShardLayout.of({"zeroopt": saved}) == ShardLayout.of({"zeroopt": SHARD.to_dict()})


def test_describes_parameters_by_position() -> None:
    params = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5).bfloat16())]
    managed = [ManagedParam(name, p, i, 0, 1 - i) for i, (name, p) in enumerate(zip("ab", params, strict=True))]
    layout = describe_layout(managed, [], facts=FACTS, seed=1)
    assert layout.names == {0: "b", 1: "a"} and list(layout.names) == [0, 1]
    assert layout.shapes == {0: [5], 1: [3, 4]}
    assert layout.dtypes == {0: "torch.bfloat16", 1: "torch.float32"}
    assert layout.ranges == {}
