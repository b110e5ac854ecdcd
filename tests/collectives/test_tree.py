"""Messages in rounds: the bits of pairs at any number of ranks, few messages, and failures that reach everyone."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from training import train
from transports import connect, sum_of_slices, values
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.collectives import Transport
from zeroopt.collectives.tree import FROM_RANKS, SLICE_BYTES, TreeTransport, goes_in_rounds

NUMEL = 7  # of a slice
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64,) * 2,
]


def count_messages(transport: TreeTransport) -> Counter[str]:
    """What this rank starts from now on."""
    counts: Counter[str] = Counter()
    for name in ("send", "receive"):
        start = getattr(transport, name)

        def counted(tensors: dict[int, Tensor], tag: int, name: str = name, start: Any = start) -> Any:
            counts[name] += len(tensors)
            return start(tensors, tag)

        setattr(transport, name, counted)
    return counts


def exchange() -> tuple[int, list[list[Tensor]], Tensor, Tensor, Tensor, int]:
    """This rank's slice; sums by dtype, finished in another order on each rank; what is gathered; most messages of a bucket."""
    transport = connect("tree")
    assert isinstance(transport, TreeTransport)
    rank, size = dist.get_rank(), dist.get_world_size()
    pending, sums = [], []
    for number, (dtype, out_dtype) in enumerate(DTYPES):
        full = values(rank, NUMEL * size, dtype, number)
        base = torch.arange(NUMEL).to(out_dtype)
        outs = [torch.empty_like(base), base.clone(), *([transport.own_slice(full)] if dtype is out_dtype else [])]
        pending += [transport.start_reduce_scatter(full, out, base if out is outs[1] else None) for out in outs]
        sums.append(outs)
    gathered = torch.zeros(NUMEL * size)
    transport.own_slice(gathered).fill_(rank)
    pending.append(transport.start_all_gather(gathered))
    flags, largest = torch.full((3,), rank, dtype=torch.uint8), torch.empty(3, dtype=torch.uint8)
    pending.append(transport.start_max(flags, largest))
    number = transport.gather_scalar(torch.tensor(float(rank)))
    for collective in reversed(pending) if rank % 2 else pending:
        collective.finish()
        collective.wait_until_read()
        collective.finish()
    counts = count_messages(transport)
    one = transport.start_reduce_scatter(values(rank, NUMEL * size, torch.float32), torch.empty(NUMEL))
    one.finish()
    one.wait_until_read()
    return (
        transport.slice_index,
        [[s.clone() for s in outs] for outs in sums],
        gathered,
        largest,
        number,
        counts["send"],
    )


@pytest.mark.parametrize("world_size", [2, 3, 5, 6, 8, 9])
def test_bits_are_those_of_pairs(run_on_ranks: RunOnRanks, world_size: int) -> None:
    answers = run_on_ranks(world_size, exchange)
    owners = sorted(range(world_size), key=lambda rank: answers[rank][0])
    for index, sums, gathered, largest, number, sent in answers:
        for case, ((dtype, out_dtype), outs) in enumerate(zip(DTYPES, sums, strict=True)):
            buckets = [values(rank, NUMEL * world_size, dtype, case) for rank in range(world_size)]
            base = torch.arange(NUMEL).to(out_dtype)
            plain, added = (sum_of_slices(buckets, index, out_dtype, b) for b in (None, base))
            for got, expected in zip(outs, (plain, added, plain), strict=False):
                assert got.dtype is out_dtype and torch.equal(got, expected), (dtype, out_dtype)
        assert torch.equal(gathered, torch.tensor(owners, dtype=torch.float32).repeat_interleave(NUMEL))
        assert largest.tolist() == [world_size - 1] * 3
        assert number.tolist() == owners
        if world_size == 8:
            assert sent == 3


def train_by(transport: str) -> list[list[Tensor]]:
    return train(
        "mlp", "adamw", {"stage": 2, "transport": transport, "bucket_mb": 0.005, "max_grad_norm": None}, steps=3
    )


@pytest.mark.parametrize("world_size", [3, 4])
def test_training_is_that_of_pairs(run_on_ranks: RunOnRanks, world_size: int) -> None:
    pairs, rounds = (run_on_ranks(world_size, train_by, name) for name in ("pairwise", "tree"))
    for one, other in zip(pairs, rounds, strict=True):
        assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def large_slices() -> tuple[int, Tensor]:
    """Messages of a bucket that is just too large for rounds, and whether its sum is right."""
    transport = connect("tree")
    assert isinstance(transport, TreeTransport)
    counts = count_messages(transport)
    with patch("zeroopt.collectives.tree.SLICE_BYTES", 4 * NUMEL - 1):
        full = values(dist.get_rank(), NUMEL * transport.num_slices, torch.float32)
        out = torch.empty(NUMEL)
        reduce = transport.start_reduce_scatter(full, out)
        reduce.finish()
        reduce.wait_until_read()
        everyone = [values(rank, full.numel(), full.dtype) for rank in range(transport.num_slices)]
    return counts["send"], out - sum_of_slices(everyone, transport.slice_index, out.dtype)


def test_large_slices_go_straight_to_their_owners(run_on_ranks: RunOnRanks) -> None:
    for messages, difference in run_on_ranks(4, large_slices):
        assert messages == 3
        assert not difference.any()


def test_what_goes_in_rounds() -> None:
    assert goes_in_rounds(FROM_RANKS * SLICE_BYTES, FROM_RANKS)
    assert not goes_in_rounds(FROM_RANKS * SLICE_BYTES + 1, FROM_RANKS)
    assert not goes_in_rounds(2**26, 10_000)  # memory stays bounded
    assert not goes_in_rounds(0, 1)


@pytest.mark.parametrize(("item_bytes", "most"), [(4, 1.01), (8, 1.01), (2, 2.6)])
def test_staging_is_told_before(item_bytes: int, most: float) -> None:
    for size in (8, 24, 64):
        num_bytes = size * 4096
        assert 0.8 * num_bytes <= TreeTransport.staging_bytes(num_bytes, item_bytes, size, 1) <= most * num_bytes


def miss_one(kind: str) -> str:
    """The last rank does something else; the others wait for it, each by way of others."""
    transport = TreeTransport(dist.new_group())
    dist.barrier()  # giving up breaks connections, which a rank that still connects to others would take for a failure
    if dist.get_rank() == dist.get_world_size() - 1:
        transport.give_up("test")
        return "gave up"
    full = torch.zeros(NUMEL * transport.num_slices)
    try:
        start(transport, kind, full)
    except zeroopt.CollectiveError as error:
        transport.give_up("a collective failed")
        return f"{type(error).__name__}: {error}"
    return "no error"


def start(transport: Transport, kind: str, full: Tensor) -> None:
    if kind == "reduce-scatter":
        transport.start_reduce_scatter(full, torch.empty(NUMEL), label="bucket 1").finish()
    elif kind == "all-gather":
        transport.start_all_gather(full, label="bucket 1").finish()
    elif kind == "max":
        transport.start_max(
            torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), label="bucket 1"
        ).finish()
    else:
        transport.gather_scalar(torch.zeros(()), label="bucket 1")


@pytest.mark.parametrize("kind", ["reduce-scatter", "all-gather", "max", "gather"])
def test_failures_reach_everyone_and_name_a_rank(run_on_ranks: RunOnRanks, kind: str) -> None:
    *others, last = run_on_ranks.outcomes(5, miss_one, kind)
    assert last == "gave up"
    for answer in others:
        assert not isinstance(answer, RankError), answer
        assert answer.startswith(f"CollectiveError: transport tree, {kind} of bucket 1: failed for want of rank "), (
            answer
        )


def drop_what_is_on_its_way() -> Tensor:
    """The first transport is dropped before anybody has waited for its sum; its thread ends when it has passed everything on."""
    bucket = values(dist.get_rank(), NUMEL * dist.get_world_size(), torch.float32)
    TreeTransport(dist.group.WORLD).start_reduce_scatter(bucket.clone(), torch.empty(NUMEL))
    transport, out = TreeTransport(dist.group.WORLD), torch.empty(NUMEL)
    transport.start_reduce_scatter(bucket, out).finish()
    return out - sum_of_slices(
        [values(rank, bucket.numel(), bucket.dtype) for rank in range(dist.get_world_size())],
        transport.slice_index,
        out.dtype,
    )


def test_a_dropped_transport_keeps_nobody_waiting(run_on_ranks: RunOnRanks) -> None:
    assert not any(difference.any() for difference in run_on_ranks(3, drop_what_is_on_its_way))
