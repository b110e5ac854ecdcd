"""One level after the other: sums of the tree, bytes of a ring, groups that threads do not share, and failures that say among whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import reference
import torch
import torch.distributed as dist
from short_timeouts import lose_patience
from torch import Tensor
from training import batch, build, loss_of, snapshot, train
from transports import CPU, hosts, values
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.collectives import hierarchy
from zeroopt.collectives.base import slice_of
from zeroopt.collectives.hierarchy import HierarchyTransport
from zeroopt.collectives.select import connect_transport, kind_for
from zeroopt.collectives.site import Site

NUMEL = 8 * 6 * 5


def connect_on(of_rank: Sequence[int]) -> HierarchyTransport:
    with hosts(of_rank):
        transport = connect_transport("hierarchy", dist.group.WORLD, CPU)
    assert isinstance(transport, HierarchyTransport)
    return transport


def exchange(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[int, Tensor, Tensor, Tensor, int]:
    """This rank's slice, its sum in float32, what is gathered, gathered numbers, and the bytes of the reduce-scatter."""
    transport = connect_transport(hierarchy(*sizes), dist.group.WORLD, CPU)
    out, gathered = torch.empty(NUMEL // transport.num_slices), torch.zeros(NUMEL)
    full = values(dist.get_rank(), NUMEL, dtype)
    reduce = transport.start_reduce_scatter(full, out)
    transport.own_slice(gathered).fill_(dist.get_rank())
    gather = transport.start_all_gather(gathered)
    numbers = transport.gather_scalar(torch.tensor(float(dist.get_rank())))  # nobody has finished anything
    reduce.finish()
    reduce.wait_until_read()
    gather.finish()
    return transport.slice_index, out, gathered, numbers, transport.sent_bytes


@pytest.mark.parametrize(
    ("world_size", "sizes"), [(4, (2,)), (4, (4,)), (6, (2,)), (6, (3,)), (8, (2, 2)), (8, (2, 2, 2))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_the_closest_come_first(
    run_on_ranks: RunOnRanks, world_size: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """What a level has summed goes on in the dtype of the bucket."""
    sums = [values(rank, NUMEL, dtype) for rank in range(world_size)]
    levels = list(sizes)
    if len(sums) > torch.Size(sizes).numel():
        levels.append(world_size // torch.Size(sizes).numel())
    for level, size in enumerate(levels):
        last = level + 1 == len(levels)
        sums = [
            reference.reduce(sums[i : i + size], torch.float32 if last else dtype) for i in range(0, len(sums), size)
        ]
    (total,) = sums
    answers = run_on_ranks(world_size, exchange, sizes, dtype)
    owners = sorted(range(world_size), key=lambda rank: answers[rank][0])
    for index, out, gathered, numbers, sent in answers:
        assert torch.equal(out, slice_of(total, index, world_size))
        assert torch.equal(gathered, torch.tensor(owners, dtype=torch.float32).repeat_interleave(NUMEL // world_size))
        assert numbers.tolist() == owners
        assert sent == NUMEL * (dtype.itemsize + 4) * (world_size - 1) // world_size
    if dtype is torch.float32 and all(size in (2, 4) for size in levels[:-1]):
        assert torch.equal(total, reference.reduce([values(rank, NUMEL, dtype) for rank in range(world_size)], dtype))


def places(of_rank: list[int]) -> tuple[int, bool]:
    """This rank's slice, and whether another model has groups of its own, in which its thread starts collectives."""
    first, second = connect_on(of_rank), connect_on(of_rank)
    return first.slice_index, all(
        one._group is not two._group for one, two in zip(first._steps, second._steps, strict=True)
    )


@pytest.mark.parametrize(
    ("of_rank", "slices"),
    [
        ([0, 0, 1, 1], [0, 2, 1, 3]),
        ([0, 1, 0, 1], [0, 1, 2, 3]),
        ([0, 0, 0, 0], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_hosts_are_levels(run_on_ranks: RunOnRanks, of_rank: list[int], slices: list[int]) -> None:
    assert run_on_ranks(4, places, of_rank) == [(index, True) for index in slices]


def test_hosts_with_ranks_in_another_order_are_refused(run_on_ranks: RunOnRanks) -> None:
    """Places in a process group go by numbers of ranks, those in a level by hosts."""
    for outcome in run_on_ranks.outcomes(4, places, [0, 1, 1, 0]):
        assert isinstance(outcome, RankError)
        assert outcome.type_name == "ConfigError" and "needs hosts whose ranks are in one order" in outcome.message


def train_two_models() -> list[Tensor]:
    """Each with a thread of its own; gathers of one are on their way while gradients of the other are."""
    pairs = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = build("mlp")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        pairs.append((net, *zeroopt.wrap(net, optimizer, stage=2, transport=hierarchy(2), bucket_mb=0.001)))
    for step in range(6):
        for _, model, optimizer in pairs:
            loss_of(model(batch("mlp", step))).backward()
        for _, _, optimizer in pairs:
            optimizer.step()
            optimizer.zero_grad()
    return [param for net, *_ in pairs for param in snapshot(net)]


def test_two_models_side_by_side(run_on_ranks: RunOnRanks) -> None:
    first, *others = run_on_ranks(4, train_two_models)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def train_with(transports: Sequence[Any]) -> list[list[list[Tensor]]]:
    options = [{"stage": stage, "transport": transport} for stage in (0, 2) for transport in transports]
    return [train("mlp", "adamw", {**one, "bucket_mb": 0.005}, steps=3) for one in options]


def test_training_is_that_of_messages(run_on_ranks: RunOnRanks) -> None:
    for flat, level, flat_2, level_2 in run_on_ranks(4, train_with, ["pairwise", hierarchy(2)]):
        for expected, got in ((flat, level), (flat_2, level_2)):
            assert all(torch.equal(a, b) for x, y in zip(expected, got, strict=True) for a, b in zip(x, y, strict=True))


def train_with_codes(sizes: tuple[int, ...], compression: str | None) -> tuple[list[Tensor], list[int]]:
    """Parameters after some steps, and the slices that travel as codes."""
    net = build("mlp")
    options = {"transport": hierarchy(*sizes), "gradient_compression": compression, "bucket_mb": 1}
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=2, **options)
    for step in range(3):
        loss_of(model(batch("mlp", step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net), list(model.replica.transport.sent_slices)


@pytest.mark.parametrize(
    ("sizes", "sent"), [((2,), {0: [0, 1], 1: [2, 3]}), ((4,), {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]})]
)
def test_codes_travel_across_hosts(
    run_on_ranks: RunOnRanks, sizes: tuple[int, ...], sent: dict[int, list[int]]
) -> None:
    """Sums of a host do, and where there is one level alone, all gradients."""
    exact = run_on_ranks(4, train_with_codes, sizes, None)
    coded = run_on_ranks(4, train_with_codes, sizes, "int8")
    for rank, ((expected, _), (got, slices)) in enumerate(zip(exact, coded, strict=True)):
        assert slices == sent[rank % 2]
        assert all(torch.equal(a, b) for a, b in zip(got, coded[0][0], strict=True))  # replicas stay equal
        assert any(not torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def refused(sizes: tuple[int, ...] | None, of_rank: list[int]) -> str:
    try:
        if sizes is None:
            connect_on(of_rank)
        else:
            connect_transport(hierarchy(*sizes), dist.group.WORLD, CPU)
    except zeroopt.ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (None, "transport='hierarchy' needs as many ranks on each host, got hosts of [2, 1] ranks; use"),
        ((2,), "expected hierarchy(2,) to have sizes of 2 or more, whose product divides the number of ranks, 3"),
        ((), "expected hierarchy() to have sizes of 2 or more"),
        ((1, 3), "expected hierarchy(1, 3) to have sizes of 2 or more"),
    ],
)
def test_what_makes_no_levels(run_on_ranks: RunOnRanks, sizes: tuple[int, ...] | None, message: str) -> None:
    for answer in run_on_ranks(3, refused, sizes, [0, 0, 1]):
        assert answer.startswith(message)


@pytest.mark.parametrize(
    ("device", "hosts_of", "serves"),
    [
        ("cuda", [[0, 1], [2, 3]], True),
        ("cuda", [[0, 2], [1, 3]], True),
        ("cuda", [[0, 1, 2, 3]], False),  # where there is one level
        ("cuda", [[0], [1], [2]], False),
        ("cuda", [[0, 1], [2]], False),  # hosts are unlike
        ("cuda", [[0, 3], [1, 2]], False),  # and in no order
        ("cpu", [[0, 1], [2, 3]], False),
    ],
)
def test_auto_takes_levels_for_devices_of_several_hosts(device: str, hosts_of: list[list[int]], serves: bool) -> None:
    size = sum(map(len, hosts_of))
    site = Site(dist.ProcessGroup(0, size), torch.device(device))  # type: ignore[call-arg]
    vars(site)["_hosts"] = hosts_of
    with patch.object(Site, "backend", "nccl"):
        assert HierarchyTransport.serves(site) is serves
        kind = kind_for("auto", site, nests=True)
        assert (kind is HierarchyTransport) is serves
        assert kind_for("auto", site, nests=False) is not HierarchyTransport
    with patch.object(Site, "backend", "gloo"):  # which would hold up the host
        assert not HierarchyTransport.serves(site)


def miss_one() -> str:
    """Rank 3 does not take part. It is in one group with rank 2, and in another with rank 1."""
    transport = connect_transport(hierarchy(2), dist.new_group(), CPU)
    lose_patience(2.0)
    if dist.get_rank() == 3:
        return "did something else"
    try:
        transport.start_reduce_scatter(torch.zeros(8), torch.empty(2), label="bucket 1").finish()
    except zeroopt.CollectiveError as error:
        return str(error)
    return "no error"


def test_failures_say_among_whom(run_on_ranks: RunOnRanks) -> None:
    answers = run_on_ranks.outcomes(4, miss_one)
    assert not any(isinstance(answer, RankError) for answer in answers), answers
    what = "transport hierarchy, reduce-scatter of bucket 1 among ranks "
    assert answers[0].startswith(what + "0, 2: failed for want of rank 3: ")  # as rank 2 has said
    assert answers[2].startswith(what + "2, 3: failed for want of rank 3: ")
    assert answers[1].startswith(what + "1, 3: failed for want of rank 3: ")
