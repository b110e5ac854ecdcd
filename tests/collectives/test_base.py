"""What every transport has to do: the right sums, in one order, and no byte more than the collectives need."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from measure import run_fresh
from torch import Tensor, nn
from transports import CPU, TRANSPORTS, connect, sum_of_slices, values
from worker_pool import RunOnRanks

import zeroopt
from bench.compare.network import sent_bytes
from zeroopt.collectives import Transport

# Dtype of buckets, dtype of sums.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
SHARD_NUMELS = [1, 1000]


def exchange_all(name: str) -> tuple[int, list[dict[str, Tensor]]]:
    """This rank's slice, and for each case what several collectives in flight gave."""
    transport = connect(name)
    cases = [(numel, *dtypes) for dtypes in DTYPES for numel in SHARD_NUMELS]
    return transport.slice_index, [exchange(transport, *case) for case in cases]


def exchange(transport: Transport, shard_numel: int, dtype: torch.dtype, out_dtype: torch.dtype) -> dict[str, Tensor]:
    """Start collectives, and finish them in the opposite order."""
    mine = values(dist.get_rank(), shard_numel * transport.num_slices, dtype)
    full, in_place, gathered = (transport.allocate(mine.numel(), dtype, CPU) for _ in range(3))
    full.copy_(mine)
    in_place.copy_(mine)
    transport.own_slice(gathered).fill_(transport.slice_index + 1)
    base = torch.arange(shard_numel).to(out_dtype)
    results = {"apart": torch.empty_like(base), "added": torch.empty_like(base), "added in place": base.clone()}
    transport.start_rendezvous("gather").finish()
    pending = [
        transport.start_reduce_scatter(full, results["apart"]),
        transport.start_reduce_scatter(full, results["added"], base=base),
        transport.start_reduce_scatter(full, results["added in place"], base=results["added in place"]),
        transport.start_all_gather(gathered),
    ]
    if dtype is out_dtype:
        results["in place"] = transport.own_slice(in_place)
        pending.append(transport.start_reduce_scatter(in_place, results["in place"]))
    transport.progress()
    transport.flush()
    for collective in reversed(pending):
        collective.finish()
        collective.wait_until_read()
        collective.finish()  # which does nothing
    return {key: value.clone() for key, value in results.items()} | {"gathered": gathered.clone()}


@pytest.mark.parametrize(("name", "world_size"), TRANSPORTS)
def test_sums_and_gathers(run_on_ranks: RunOnRanks, name: str, world_size: int) -> None:
    indices, by_rank = zip(*run_on_ranks(world_size, exchange_all, name), strict=True)
    assert sorted(indices) == list(range(world_size))
    for index, cases in zip(indices, by_rank, strict=True):
        remaining = iter(cases)
        for dtype, out_dtype in DTYPES:
            for shard_numel in SHARD_NUMELS:
                buckets = [values(rank, shard_numel * world_size, dtype) for rank in range(world_size)]
                base = torch.arange(shard_numel).to(out_dtype)
                total = sum_of_slices(buckets, index, out_dtype)
                added = sum_of_slices(buckets, index, out_dtype, base)
                in_order = torch.arange(1, world_size + 1).repeat_interleave(shard_numel).to(dtype)
                expected = {"apart": total, "in place": total, "added": added, "added in place": added}
                for key, value in next(remaining).items():
                    what = f"{key}, {shard_numel} x {dtype} into {out_dtype}"
                    assert_sum(value, in_order if key == "gathered" else expected[key], name, dtype, what)


def assert_sum(value: Tensor, expected: Tensor, name: str, dtype: torch.dtype, what: str) -> None:
    """Bit for bit the tree's sum, but for transports that round buckets of 16 bits on the way, and torch's own order."""
    assert value.dtype is expected.dtype
    if name == "torch" or (name in ("hybrid", "hierarchy") and dtype.itemsize == 2):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(value, expected, rtol=4 * eps, atol=8 * eps, msg=lambda text: f"{what}: {text}")
    else:
        assert torch.equal(value, expected), what


def exchange_numbers(name: str) -> tuple[int, list[Tensor], list[Tensor]]:
    """This rank's slice, maxima over ranks from two collectives in flight, and the gathered scalars of all ranks."""
    transport = connect(name)
    rank = dist.get_rank()
    flags = [transport.allocate(4, torch.uint8, CPU) for _ in range(2)]
    flags[0].copy_(torch.arange(4) == rank)
    flags[1].fill_(10 * rank)
    maxima = [torch.empty_like(flag) for flag in flags]
    pending = [transport.start_max(flag, out) for flag, out in zip(flags, maxima, strict=True)]
    for collective in reversed(pending):
        collective.finish()
        collective.wait_until_read()
    numbers = [
        transport.gather_scalar(torch.tensor(transport.slice_index + i / 3, dtype=dtype))
        for i, dtype in enumerate((torch.float32, torch.float64))
    ]
    transport.barrier()
    return transport.slice_index, maxima, numbers


@pytest.mark.parametrize(("name", "world_size"), TRANSPORTS)
def test_numbers(run_on_ranks: RunOnRanks, name: str, world_size: int) -> None:
    for _, (flags, largest), (narrow, wide) in run_on_ranks(world_size, exchange_numbers, name):
        assert flags.tolist() == [int(rank < world_size) for rank in range(4)]
        assert largest.tolist() == [10 * (world_size - 1)] * 4
        assert torch.equal(narrow, torch.arange(world_size, dtype=torch.float32))  # by slice
        assert torch.equal(wide, torch.arange(world_size, dtype=torch.float64) + 1 / 3)


def wait_for_the_last(name: str) -> tuple[float, float]:
    """When this rank came to a barrier, and when it left; one clock for all ranks."""
    transport = connect(name)
    if dist.get_rank() == transport.num_slices - 1:
        time.sleep(0.2)
    came = time.monotonic()
    transport.barrier()
    return came, time.monotonic()


@pytest.mark.parametrize(("name", "world_size"), TRANSPORTS)
def test_barrier(run_on_ranks: RunOnRanks, name: str, world_size: int) -> None:
    came, left = zip(*run_on_ranks(world_size, wait_for_the_last, name), strict=True)
    assert min(left) >= max(came)


class Drill:
    """Collectives on a few buckets, each of which is finished, and checked, before its bucket is used again."""

    def __init__(self, transport: Transport, shard_numels: Sequence[int]) -> None:
        self._transport = transport
        self._buckets = [transport.allocate(n * transport.num_slices, torch.float32, CPU) for n in shard_numels]
        self._finish: dict[int, Callable[[], None]] = {}  # by bucket
        self._number = 0  # of the collective, so that all of them move other values

    @property
    def in_flight(self) -> list[int]:
        return list(self._finish)

    def finish(self, bucket: int) -> None:
        if bucket in self._finish:
            self._finish.pop(bucket)()

    def start_sum(self, bucket: int, *, in_place: bool, with_base: bool) -> None:
        self.finish(bucket)
        transport, full, number = self._transport, self._buckets[bucket], self._next_number()
        everyone = [values(rank, full.numel(), full.dtype, number) for rank in range(dist.get_world_size())]
        full.copy_(everyone[dist.get_rank()])
        own = transport.own_slice(full)
        out = own if in_place else torch.empty_like(own)
        base = torch.full_like(own, number) if with_base else None
        pending = transport.start_reduce_scatter(full, out, base)

        def finish() -> None:
            pending.finish()
            assert torch.equal(out, sum_of_slices(everyone, transport.slice_index, out.dtype, base))
            pending.wait_until_read()

        self._finish[bucket] = finish

    def start_gathers(self, buckets: Sequence[int]) -> None:
        """As in a step: nobody needs these buckets any more when the first gather starts, and a flush follows the last."""
        for bucket in buckets:
            self.finish(bucket)
        self._transport.start_rendezvous("gathers").finish()
        for bucket in buckets:
            self._start_gather(bucket)
        self._transport.flush()

    def _start_gather(self, bucket: int) -> None:
        full, number = self._buckets[bucket], self._next_number()
        gathered = values(0, full.numel(), full.dtype, number)
        self._transport.own_slice(full).copy_(self._transport.own_slice(gathered))
        pending = self._transport.start_all_gather(full)

        def finish() -> None:
            pending.finish()
            assert torch.equal(full, gathered)

        self._finish[bucket] = finish

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def run_drill(name: str, seed: int, num_starts: int) -> None:
    """Start random collectives, the same on all ranks; each rank finishes them in an order and at a pace of its own."""
    transport = connect(name)
    plan, pace = random.Random(seed), random.Random(f"{seed} {dist.get_rank()}")
    order = plan if name == "hybrid" else pace  # a rank that waits for another host does nothing for its own
    drill = Drill(transport, [plan.randint(1, 2000) for _ in range(5)])
    for _ in range(num_starts):
        if plan.random() < 0.3:
            drill.start_gathers(plan.sample(range(5), plan.randint(1, 4)))
        else:
            drill.start_sum(plan.randrange(5), in_place=plan.random() < 0.5, with_base=plan.random() < 0.5)
        while drill.in_flight and order.random() < 0.4:
            drill.finish(order.choice(drill.in_flight))
        if pace.random() < 0.3:
            transport.progress()
        time.sleep(pace.choice([0.0, 0.0, 1e-4, 2e-3]))
    while drill.in_flight:
        drill.finish(order.choice(drill.in_flight))


@pytest.mark.parametrize(
    ("name", "world_size"), [("single", 1), ("pairwise", 3), ("shm", 2), ("shm", 3), ("shm", 4), ("hybrid", 4)]
)
def test_any_sequence(run_on_ranks: RunOnRanks, name: str, world_size: int) -> None:
    for seed in range(3):
        run_on_ranks(world_size, run_drill, name, seed, num_starts=50)


@pytest.mark.slow
def test_any_sequence_with_more_ranks_than_cores() -> None:
    run_fresh(8, run_drill, "shm", seed=8, num_starts=30)


def bytes_per_step(stage: int, width: int) -> tuple[int, int]:
    """Bytes that one step sends, and the bytes of the gradients."""
    net = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=stage, transport="pairwise")
    transport = optimizer._transport
    before = transport.sent_bytes
    model(torch.randn(2, width)).sum().backward()
    optimizer.step()
    return transport.sent_bytes - before, sum(p.nbytes for p in net.parameters())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_traffic_is_that_of_one_all_reduce(run_on_ranks: RunOnRanks, world_size: int) -> None:
    """A ring all-reduce, which DDP uses, sends 2 (N-1)/N of the gradients."""
    for stage in (0, 1, 2):
        for sent, gradient_bytes in run_on_ranks(world_size, bytes_per_step, stage, 300):
            ideal = 2 * gradient_bytes * (world_size - 1) / world_size
            assert ideal <= sent <= 1.01 * ideal


def kernels_count_per_step(stage: int, transport: str) -> tuple[int, int]:
    """Bytes that the kernel has sent over this rank's connections in a step, and the bytes of the gradients."""
    net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=stage, transport=transport)
    counts = []
    for _ in range(3):  # what is sent twice on a busy machine counts twice: the least is the truest
        before = sent_bytes()
        dist.barrier()  # nobody sends before all have read
        model(torch.randn(2, 1024)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter in net.parameters():
            parameter.sum()  # waits for its gather, which belongs to this step
        dist.barrier()
        counts.append(sent_bytes() - before)
    return min(counts), sum(p.nbytes for p in net.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_traffic_as_the_kernel_counts_it(run_on_ranks: RunOnRanks, stage: int) -> None:
    for counted, gradient_bytes in run_on_ranks(2, kernels_count_per_step, stage, "pairwise"):
        assert gradient_bytes <= counted <= 1.05 * gradient_bytes  # 2 (N-1)/N of the gradients, and heads of messages
    for counted, gradient_bytes in run_on_ranks(2, kernels_count_per_step, stage, "shm"):
        assert counted <= 0.05 * gradient_bytes  # the test's own barriers
