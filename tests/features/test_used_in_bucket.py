"""Ranks hear of the parameters of one bucket after the other which of them any rank has used."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from lone_slice import LoneSlice
from transports import CPU, TRANSPORTS, connect
from worker_pool import RunOnRanks

from zeroopt.features.used_in_bucket import UsedInBucket

SIZES = (3, 1, 7, 2, 5)


def hear_of_buckets(name: str) -> list[list[int]]:
    used, rank = UsedInBucket(connect(name)), dist.get_rank()
    heard = []
    for count in SIZES:
        used.fit(max(4, count), CPU)  # which makes more room once
        used.tell(bytearray(i % dist.get_world_size() == rank and i != 2 for i in range(count)), f"bucket of {count}")
        heard.append(used.hear())
    return heard


@pytest.mark.parametrize(("name", "world_size"), TRANSPORTS)
def test_every_rank_hears_what_any_rank_has_said(run_on_ranks: RunOnRanks, name: str, world_size: int) -> None:
    expected = [[int(i != 2) for i in range(count)] for count in SIZES]
    assert run_on_ranks(world_size, hear_of_buckets, name) == [expected] * world_size


def test_two_buffers_are_used_in_turn() -> None:
    transport = LoneSlice()
    used = UsedInBucket(transport)
    used.fit(4, torch.device("cpu"))
    used.fit(3, torch.device("cpu"))
    assert len(transport.allocated) == 2 and not transport.freed
    used.fit(5, torch.device("cpu"))
    assert len(transport.allocated) == 4 and len(transport.freed) == 2
