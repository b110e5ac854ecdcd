"""The transports: sums in rank order, and no byte more than a reduce-scatter and an all-gather need."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import loopback_bytes
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.collectives import select_transport
from zeroopt.collectives.pairwise import StagingPool

CPU = torch.device("cpu")


def inputs(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def exchange(name: str, shard_numel: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Several collectives in flight at once, finished in another order than they were started."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    transport = select_transport(name, dist.group.WORLD, CPU)(dist.group.WORLD)
    full = inputs(rank, shard_numel * world_size, dtype)
    base = torch.arange(shard_numel).to(dtype)
    apart, in_place, added = torch.empty(shard_numel, dtype=dtype), full.clone(), base.clone()
    gathered = torch.full_like(full, -1)
    transport.own_slice(gathered).fill_(rank)
    pending = [
        transport.start_reduce_scatter(full, apart),
        transport.start_reduce_scatter(in_place, transport.own_slice(in_place)),
        transport.start_reduce_scatter(full, added, base=added),
        transport.start_all_gather(gathered),
    ]
    for collective in reversed(pending):
        collective.finish()
    own = transport.own_slice(in_place).clone()
    return {"apart": apart, "in_place": own, "added": added, "gathered": gathered}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_numel", [1, 1000])
def test_pairwise(run_on_ranks: RunOnRanks, world_size: int, dtype: torch.dtype, shard_numel: int) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    total = torch.zeros(shard_numel * world_size, dtype=wide)
    for rank in range(world_size):
        total += inputs(rank, shard_numel * world_size, dtype).to(wide)
    for rank, got in enumerate(run_on_ranks(world_size, exchange, "pairwise", shard_numel, dtype)):
        own = total[rank * shard_numel : (rank + 1) * shard_numel]
        assert torch.equal(got["apart"], own.to(dtype))
        assert torch.equal(got["in_place"], own.to(dtype))
        assert torch.equal(got["added"], (torch.arange(shard_numel).to(dtype).to(wide) + own).to(dtype))
        assert torch.equal(got["gathered"], torch.arange(world_size).repeat_interleave(shard_numel).to(dtype))


@pytest.mark.parametrize("world_size", [2, 3])
def test_torch_native(run_on_ranks: RunOnRanks, world_size: int) -> None:
    pairwise = run_on_ranks(world_size, exchange, "pairwise", 100, torch.float32)
    native = run_on_ranks(world_size, exchange, "torch", 100, torch.float32)
    for rank in range(world_size):
        for name, value in pairwise[rank].items():
            torch.testing.assert_close(native[rank][name], value)


def chosen(name: str) -> str:
    try:
        return select_transport(name, dist.group.WORLD, CPU)(dist.group.WORLD).name
    except zeroopt.ConfigError as error:
        return str(error)


def test_select(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, chosen, "auto") == ["pairwise"] * 2
    assert run_on_ranks(2, chosen, "torch") == ["torch"] * 2
    assert run_on_ranks(1, chosen, "auto") == ["single"]


def test_pairwise_needs_gloo_and_cpu(run_on_ranks: RunOnRanks) -> None:
    (message,) = run_on_ranks(1, choose_for_cuda)
    assert message.startswith("transport='pairwise' needs CPU parameters and the Gloo backend, got cuda parameters")


def choose_for_cuda() -> str:
    try:
        select_transport("pairwise", dist.group.WORLD, torch.device("cuda"))
        return "no error"
    except zeroopt.ConfigError as error:
        return str(error)


def bytes_per_step(stage: int, width: int) -> tuple[int, int]:
    """Bytes that one step sends, and the bytes of the gradients."""
    net = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=stage)
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


def loopback_bytes_per_step(stage: int) -> tuple[float, int]:
    """Bytes a rank that the kernel's loopback device counts in a step, and the bytes of the gradients."""
    net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=stage)
    counts = []
    for _ in range(3):  # other programs may use the device too: the least is the truest
        dist.barrier()
        before = loopback_bytes()
        model(torch.randn(2, 1024)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        counts.append((loopback_bytes() - before) / dist.get_world_size())
    return min(counts), sum(p.nbytes for p in net.parameters())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_traffic_as_the_network_device_counts_it(run_on_ranks: RunOnRanks, stage: int) -> None:
    for counted, gradient_bytes in run_on_ranks(2, loopback_bytes_per_step, stage):
        assert gradient_bytes <= counted <= 1.05 * gradient_bytes  # 2 (N-1)/N of the gradients, and TCP's own


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30))
@settings(deadline=None)
def test_staging_pool_keeps_what_was_in_use_at_once(sizes: list[int]) -> None:
    pool = StagingPool()
    for first, second in pairwise(sizes):
        a, b = pool.take(first), pool.take(second)
        assert a.numel() >= first and b.numel() >= second and a.data_ptr() != b.data_ptr()
        pool.give_back(a)
        pool.give_back(b)
    assert len(pool._free) <= 2
