"""Several hosts: shared memory within each, messages between them. Here the hosts are made up, on one machine."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
import reference
import torch
import torch.distributed as dist
from torch import Tensor
from training import train
from transports import CPU, hosts, values
from worker_pool import RunOnRanks

from zeroopt.collectives.base import slice_of
from zeroopt.collectives.hybrid import HybridTransport
from zeroopt.collectives.select import connect_transport

NUMEL = 4 * 6 * 11


def connect_on(of_rank: list[int]) -> HybridTransport:
    with hosts(of_rank):
        transport = connect_transport("auto", dist.group.WORLD, CPU)
    assert isinstance(transport, HybridTransport)
    return transport


def place(of_rank: list[int]) -> tuple[int, bool, list[int], float]:
    """This rank's slice, whether it writes shared parameters, who does, and this rank's place among gathered numbers."""
    transport = connect_on(of_rank)
    ranks = transport.gather_scalar(torch.tensor(float(dist.get_rank())))
    return (
        transport.slice_index,
        transport.writes_parameters,
        list(transport.writers),
        ranks[transport.slice_index].item(),
    )


@pytest.mark.parametrize(
    ("of_rank", "slices", "writers"),
    [
        ([0, 0, 1, 1], [0, 2, 1, 3], [0, 2]),
        ([0, 1, 0, 1], [0, 1, 2, 3], [0, 1]),
        ([5, 3, 3, 5], [0, 1, 3, 2], [0, 1]),
        ([0, 0, 0, 1, 1, 1], [0, 2, 4, 1, 3, 5], [0, 3]),
        ([0, 0, 1, 1, 2, 2], [0, 3, 1, 4, 2, 5], [0, 2, 4]),
    ],
)
def test_who_owns_and_writes_what(
    run_on_ranks: RunOnRanks, of_rank: list[int], slices: list[int], writers: list[int]
) -> None:
    for rank, (index, writes, all_writers, found) in enumerate(run_on_ranks(len(of_rank), place, of_rank)):
        assert index == slices[rank]
        assert all_writers == writers
        assert writes == (rank in writers)
        assert found == rank


def reduce_once(of_rank: list[int], dtype: torch.dtype) -> tuple[int, Tensor, int]:
    """This rank's slice, its sum in float32, and the bytes that the rank has sent to other hosts."""
    transport = connect_on(of_rank)
    full = transport.allocate(NUMEL, dtype, CPU)
    full.copy_(values(dist.get_rank(), NUMEL, dtype))
    out = torch.empty(NUMEL // transport.num_slices)
    reduce = transport.start_reduce_scatter(full, out)
    reduce.finish()
    reduce.wait_until_read()
    return transport.slice_index, out, transport.sent_bytes


@pytest.mark.parametrize("of_rank", [[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_within_hosts_come_first(run_on_ranks: RunOnRanks, of_rank: list[int], dtype: torch.dtype) -> None:
    """A host's sum goes to the others in the dtype of the bucket."""
    world_size, names = len(of_rank), list(dict.fromkeys(of_rank))
    buckets = [values(rank, NUMEL, dtype) for rank in range(world_size)]
    of_host = [
        reference.reduce([b for b, host in zip(buckets, of_rank, strict=True) if host == name], dtype) for name in names
    ]
    expected = reference.reduce(of_host, torch.float32)
    answers = run_on_ranks(world_size, reduce_once, of_rank, dtype)
    for index, total, _ in answers:
        assert torch.equal(total, slice_of(expected, index, world_size))
    for name in names:  # each slice of each host's sum goes to the one host that owns it
        sent = sum(answer[2] for answer, host in zip(answers, of_rank, strict=True) if host == name)
        assert sent == NUMEL * dtype.itemsize * (len(names) - 1) // len(names)


def train_on_hosts(of_rank: list[int], variants: list[dict[str, Any]]) -> list[list[list[Tensor]]]:
    with hosts(of_rank):
        return [train("mlp", "adamw", {**options, "bucket_mb": 0.005}, steps=3) for options in variants]


def test_training_is_that_of_one_host(run_on_ranks: RunOnRanks) -> None:
    variants = [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 2, "share_parameters": True}]
    for one, two in zip(
        run_on_ranks(4, train_on_hosts, [0, 0, 0, 0], variants),
        run_on_ranks(4, train_on_hosts, [0, 0, 1, 1], variants),
        strict=True,
    ):
        for options, expected, got in zip(variants, one, two, strict=True):
            for step, (before, after) in enumerate(zip(expected, got, strict=True)):
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), (options, step)


def through_rounds() -> tuple[int, Tensor, Tensor, Tensor]:
    """This rank's slice, its sum, what is gathered, and gathered numbers; between hosts messages go in rounds."""
    with patch("zeroopt.collectives.tree.FROM_RANKS", 3):
        transport = connect_on([0, 0, 1, 1, 2, 2, 3, 3])
    full, gathered = (transport.allocate(NUMEL // 3 * 4, torch.float32, CPU) for _ in range(2))
    full.copy_(values(dist.get_rank(), full.numel(), full.dtype))
    transport.own_slice(gathered).fill_(dist.get_rank())
    out = torch.empty(full.numel() // transport.num_slices)
    reduce = transport.start_reduce_scatter(full, out)
    reduce.finish()
    reduce.wait_until_read()
    transport.start_rendezvous("gather").finish()
    gather = transport.start_all_gather(gathered)
    transport.flush()
    gather.finish()
    return transport.slice_index, out, gathered.clone(), transport.gather_scalar(torch.tensor(float(dist.get_rank())))


def test_many_hosts_exchange_in_rounds(run_on_ranks: RunOnRanks) -> None:
    answers = run_on_ranks(8, through_rounds)
    owners = sorted(range(8), key=lambda rank: answers[rank][0])
    assert [owners.index(rank) for rank in range(8)] == [0, 4, 2, 6, 1, 5, 3, 7]
    total = reference.reduce([values(rank, NUMEL // 3 * 4, torch.float32) for rank in range(8)], torch.float32)
    for index, out, gathered, numbers in answers:
        assert torch.equal(out, slice_of(total, index, 8))
        assert torch.equal(gathered, torch.tensor(owners, dtype=torch.float32).repeat_interleave(NUMEL // 6))
        assert numbers.tolist() == owners


def meet_late() -> tuple[float, float]:
    """When this rank came to a rendezvous, and when it went on."""
    transport = connect_on([0, 0, 1, 1])
    if dist.get_rank() in (1, 2):
        time.sleep(0.2)
    came = time.monotonic()
    transport.start_rendezvous("test").finish()
    return came, time.monotonic()


def test_rendezvous_is_among_the_ranks_of_a_host(run_on_ranks: RunOnRanks) -> None:
    """Only they write into a rank's buffers before it has started to gather."""
    came, went = zip(*run_on_ranks(4, meet_late), strict=True)
    for host in (slice(0, 2), slice(2, 4)):
        assert min(went[host]) >= max(came[host])


def gather_and_leave() -> Tensor:
    """Every rank's number in a bucket. Only rank 0 waits for it, while all others are in a barrier, in which nobody looks at gathers."""
    transport = connect_on([0, 0, 1, 1])
    full = transport.allocate(NUMEL, torch.float32, CPU)
    transport.own_slice(full).fill_(dist.get_rank())
    transport.start_rendezvous("test").finish()
    gather = transport.start_all_gather(full)
    if dist.get_rank() == 0:
        gather.finish()
    dist.barrier()
    gather.finish()
    return full.clone()


def test_what_comes_from_other_hosts_is_handed_on_whatever_a_rank_does_meanwhile(run_on_ranks: RunOnRanks) -> None:
    owners = torch.tensor([0.0, 2.0, 1.0, 3.0]).repeat_interleave(NUMEL // 4)
    for full in run_on_ranks(4, gather_and_leave):
        assert torch.equal(full, owners)
