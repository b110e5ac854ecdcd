"""Buckets of one storage go together on a device, up to a size; on the CPU each is alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zeroopt import ops
from zeroopt.stepping import grouping
from zeroopt.stepping.grouping import in_groups

CUDA = torch.device("cuda", 0)
FLOAT32 = ops.Storage()
BF16 = ops.Storage(torch.bfloat16, grad_dtype=torch.float32)


@dataclass(frozen=True)
class Shard:
    """As much of an own shard as is looked at."""

    name: str
    numel: int
    device: torch.device = CUDA

    @property
    def master(self) -> Any:
        return SimpleNamespace(param=torch.empty(self.numel, device="meta"))


def names(fused: list[tuple[Any, ops.Storage]], *, one_by_one: bool = False) -> list[str]:
    return ["".join(shard.name for shard in shards) for shards, _ in in_groups(fused, one_by_one=one_by_one)]


def test_all_of_one_storage_go_together_in_their_order() -> None:
    fused: list[tuple[Any, ops.Storage]] = [
        (Shard("a", 1), FLOAT32),
        (Shard("b", 1), BF16),
        (Shard("c", 1), FLOAT32),
        (Shard("d", 1), BF16),
    ]
    assert names(fused) == ["ac", "bd"]
    assert names(fused, one_by_one=True) == ["a", "b", "c", "d"]
    assert [storage for _, storage in in_groups(fused, one_by_one=False)] == [FLOAT32, BF16]


def test_each_is_alone_on_the_cpu() -> None:
    assert names([(Shard(name, 1, torch.device("cpu")), FLOAT32) for name in "abc"]) == ["a", "b", "c"]


def test_those_that_are_needed_first_fill_a_group_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "MOST_ELEMENTS", 10)
    sizes = {"a": 4, "b": 30, "c": 5, "d": 3, "e": 7}
    assert names([(Shard(name, numel), FLOAT32) for name, numel in sizes.items()]) == ["a", "b", "c", "de"]
