"""The pairwise transport: slices in parts, through bounded memory, and numbers that keep its messages apart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transports import sum_of_slices, values
from worker_pool import RunOnRanks

from zeroopt.collectives.base import slice_of
from zeroopt.collectives.pairwise import PairwiseTransport, StagingPool

MESSAGE = "zeroopt.collectives.pairwise.MESSAGE_BYTES"
STAGING = "zeroopt.collectives.pairwise.STAGING_BYTES"


class Delivered(dist.Work):
    def wait(self, *_: Any) -> bool:
        return True


class SilentGroup:
    """A group of any size within one process, whose messages go nowhere.

    Attributes:
        tags: of all messages, in the order of their start.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self.tags: list[int] = []

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._world_size

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        self.tags.append(tag)
        return Delivered()

    recv = send


def silent_transport(world_size: int, group: SilentGroup | None = None) -> tuple[PairwiseTransport, SilentGroup]:
    group = group or SilentGroup(world_size)
    return PairwiseTransport(cast(dist.ProcessGroup, group)), group


PART_NUMEL = 64


def exchange_in_parts(shard_numel: int, slots: int) -> tuple[list[Tensor], Tensor, int]:
    """Sums of buckets that are in flight together, a gathered bucket, and bytes of the memory through which a sum went."""
    transport = PairwiseTransport(dist.group.WORLD)
    part_bytes = PART_NUMEL * 4
    with patch(MESSAGE, part_bytes), patch(STAGING, slots * part_bytes * len(transport.peers)):
        buckets = [
            values(transport.slice_index, shard_numel * transport.num_slices, torch.float32, n) for n in range(3)
        ]
        sums = [transport.own_slice(buckets[0]), torch.empty(shard_numel), torch.ones(shard_numel)]
        bases = [None, None, sums[2]]
        gathered = values(0, shard_numel * transport.num_slices, torch.float32)
        for peer in transport.peers:
            slice_of(gathered, peer, transport.num_slices).zero_()
        pending = [
            transport.start_reduce_scatter(full, out, base=base)
            for full, out, base in zip(buckets, sums, bases, strict=True)
        ]
        for collective in reversed([*pending, transport.start_all_gather(gathered)]):
            collective.finish()
    return [out.clone() for out in sums], gathered, max(buffer.nbytes for buffer in transport.staging._free)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(("parts", "slots"), [(2, 1), (5, 1), (5, 2), (3, 4)])
def test_slices_go_in_parts(run_on_ranks: RunOnRanks, world_size: int, parts: int, slots: int) -> None:
    shard_numel = PART_NUMEL * (parts - 1) + 1  # one element is left for the last part
    for rank, (sums, gathered, bytes_used) in enumerate(
        run_on_ranks(world_size, exchange_in_parts, shard_numel, slots)
    ):
        assert bytes_used == min(parts, slots) * PART_NUMEL * 4 * (world_size - 1)
        assert torch.equal(gathered, values(0, shard_numel * world_size, torch.float32))
        for number, value in enumerate(sums):
            buckets = [values(r, shard_numel * world_size, torch.float32, number) for r in range(world_size)]
            base = torch.ones(shard_numel) if number == 2 else None
            assert torch.equal(value, sum_of_slices(buckets, rank, torch.float32, base))


@pytest.mark.parametrize("world_size", [2, 3, 65, 1024])
def test_staging_is_bounded_at_any_world_size(world_size: int) -> None:
    transport, _ = silent_transport(world_size)
    full = torch.zeros(2**20)
    with patch(STAGING, 2**18):
        pending = [
            transport.start_reduce_scatter(full, torch.empty(full.numel() // world_size), label=f"bucket {i}")
            for i in range(2)
        ]
        for collective in pending:
            collective.finish()
    assert [buffer.nbytes <= 2**18 for buffer in transport.staging._free] == [True] * 2


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30))
def test_staging_pool_keeps_what_was_in_use_at_once(sizes: list[int]) -> None:
    pool = StagingPool()
    for first, second in pairwise(sizes):
        a, b = pool.take(first), pool.take(second)
        assert a.numel() >= first and b.numel() >= second and a.data_ptr() != b.data_ptr()
        pool.give_back(a)
        pool.give_back(b)
    assert len(pool._free) <= 2


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_numbers_come_back_only_when_all_others_were_used(counts: list[int]) -> None:
    with patch("zeroopt.collectives.pairwise._NUM_TAGS", 64):
        transport, _ = silent_transport(2)
        taken: list[int] = []
        for count in counts:
            first = transport.take_tags(count, 0, 0)
            taken += range(first, first + count)
    # 64 numbers, of which the end of a turn may be skipped when it is too short for the 20 that somebody wants.
    for start in range(len(taken)):
        window = taken[start : start + 64 - 20]
        assert len(set(window)) == len(window)
    assert max(taken) - min(taken) < 64


def test_transports_of_a_group_have_numbers_of_their_own() -> None:
    ranges, group = [], SilentGroup(2)
    for _ in range(3):
        group.tags.clear()
        transport, _ = silent_transport(2, group)
        transport.start_all_gather(torch.zeros(2))
        transport.start_reduce_scatter(torch.zeros(2), torch.zeros(1))
        ranges.append(set(group.tags))
        assert len(ranges[-1]) == 2
    assert len(set.union(*ranges)) == 6


def gather_on_two_transports() -> list[Tensor]:
    """Ranks use the two in another order, with buckets of one size."""
    transports = [PairwiseTransport(dist.group.WORLD) for _ in range(2)]
    buckets = [torch.full((2,), 10.0 * i + dist.get_rank()) for i in range(2)]
    sums = [torch.empty(1) for _ in range(2)]
    order = [0, 1] if dist.get_rank() == 0 else [1, 0]
    reduces = {i: transports[i].start_reduce_scatter(buckets[i].clone(), sums[i]) for i in order}
    gathers = {i: transports[i].start_all_gather(buckets[i]) for i in order}
    for i in (0, 1):
        reduces[i].finish()
        gathers[i].finish()
    return [*buckets, *sums]


def test_two_transports_on_one_group(run_on_ranks: RunOnRanks) -> None:
    for first, second, first_sum, second_sum in run_on_ranks(2, gather_on_two_transports):
        assert first.tolist() == [0, 1] and second.tolist() == [10, 11]
        assert first_sum.tolist() == [1] and second_sum.tolist() == [21]


def use_numbers_up(exchanges: int) -> bool:
    """Exchange buckets until every number has been used more than once."""
    with patch("zeroopt.collectives.pairwise._NUM_TAGS", 8):
        transport = PairwiseTransport(dist.group.WORLD)
        total, correct = torch.empty(100), True
        for number in range(exchanges):
            full = torch.full((200,), float(number + transport.slice_index))
            reduce = transport.start_reduce_scatter(full.clone(), total)
            transport.start_all_gather(full).finish()
            reduce.finish()
            correct &= torch.equal(total, torch.full((100,), 2.0 * number + 1))
            correct &= torch.equal(full, torch.tensor([number, number + 1.0]).repeat_interleave(100))
    return correct


def test_numbers_are_used_again(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, use_numbers_up, 30) == [True, True]


def meet_in_a_group_of_a_former_name(store: Path) -> bool:
    """Rank 0 has had a transport in a group of this name, of which rank 2 was not."""
    rank, size = dist.get_rank(), dist.get_world_size()
    former = dist.new_group([0, 1])
    if rank in (0, 1):
        PairwiseTransport(former)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group = dist.new_group([0, 2])
    if rank not in (0, 2):
        return True
    assert rank == 2 or group.group_name == former.group_name
    flags = torch.tensor([rank], dtype=torch.uint8)
    PairwiseTransport(group).start_max(flags, flags).finish()
    return flags.item() == 2


def test_ranks_meet_in_a_group_of_a_former_name(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert all(run_on_ranks(3, meet_in_a_group_of_a_former_name, tmp_path / "store"))
