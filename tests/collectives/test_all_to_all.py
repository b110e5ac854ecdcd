"""Slices that are exchanged by the backend and summed here have the bits of the CPU transports, whatever is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.collectives.all_to_all import AllToAllTransport
from zeroopt.collectives.site import Site

TIERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"param_dtype": torch.bfloat16},
    "float16": {"param_dtype": torch.float16},
    "remainder": {"param_dtype": torch.bfloat16, "master_weights": "remainder"},
    "reduce_dtype": {"reduce_dtype": torch.bfloat16},
}


def net_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def train(options: dict[str, Any], accumulate: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters after three steps."""
    net = net_of(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    model, optimizer = zeroopt.wrap(net, optimizer, bucket_mb=0.003, **options)
    data = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        for _ in range(accumulate):
            x = torch.randn(5, 13, generator=data).to(options.get("param_dtype") or dtype)
            model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.replica.transport.name == options["transport"]
    return [param.detach().clone() for param in model.parameters()]


def train_all(variants: list[dict[str, Any]], transport: str) -> list[list[Tensor]]:
    return [train({**options, "transport": transport}, accumulate) for options in variants for accumulate in (1, 2)]


def assert_equal(mine: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for params, others in zip(mine, theirs, strict=True):
        for param, other in zip(params, others, strict=True):
            assert torch.equal(param, other)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("tier", TIERS)
def test_trains_as_by_messages(run_on_ranks: RunOnRanks, tier: str, world_size: int) -> None:
    stages = (1, 2) if tier == "reduce_dtype" else (0, 1, 2)
    variants = [{"stage": stage, **TIERS[tier]} for stage in stages]
    expected = run_on_ranks(world_size, train_all, variants, "pairwise")
    for mine, theirs in zip(run_on_ranks(world_size, train_all, variants, "all_to_all"), expected, strict=True):
        assert_equal(mine, theirs)


def train_in_double(transport: str) -> list[list[Tensor]]:
    return [train({"stage": stage, "transport": transport}, 2, torch.float64) for stage in (0, 1, 2)]


def test_in_float64(run_on_ranks: RunOnRanks) -> None:
    expected = run_on_ranks(3, train_in_double, "pairwise")
    for mine, theirs in zip(run_on_ranks(3, train_in_double, "all_to_all"), expected, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize(
    ("device", "hosts", "serves"),
    [
        ("cuda", [[0, 1, 2, 3]], True),
        ("cuda", [[0, 1], [2, 3]], False),  # where as much would cross the network for each rank of a host
        ("cpu", [[0, 1, 2, 3]], False),  # where memory is shared, or messages go
    ],
)
def test_it_is_taken_for_devices_of_one_host(device: str, hosts: list[list[int]], serves: bool) -> None:
    site = Site(dist.ProcessGroup(0, 4), torch.device(device))  # type: ignore[call-arg]
    vars(site)["_hosts"] = hosts
    assert AllToAllTransport.serves(site) is serves


def test_what_has_been_received_is_as_large_as_the_bucket() -> None:
    assert AllToAllTransport.staging_bytes(4096, 4, 8, 1) == 4096
