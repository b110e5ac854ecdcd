"""Training with zeroopt gives what DistributedDataParallel gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import MODELS, OPTIMIZERS, train_all, train_step_by_step
from ulps import EXACT, SUM_ORDER_ULPS, History, assert_same
from worker_pool import RunOnRanks

import zeroopt

STAGES = (0, 1, 2)
FUSED_ULPS = 4  # largest difference after one step


def assert_ranks_agree(results: list[list[History]]) -> None:
    """Parameters are equal on all ranks (buffers, which follow the parameters, may differ as under DDP)."""
    for variant in range(len(results[0])):
        last = [rank[variant][-1] for rank in results]
        for other in last[1:]:
            floats = [(a, b) for a, b in zip(last[0], other, strict=True)]
            assert all(torch.equal(a, b) for a, b in floats)


def variants(**options: Any) -> list[dict[str, Any] | None]:
    return [None, *({"stage": stage, **options} for stage in STAGES)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_own_step_follows_ddp_bit_for_bit(run_on_ranks: RunOnRanks, optimizer: str) -> None:
    for model in ("mlp", "lm"):
        results = run_on_ranks(2, train_all, model, optimizer, variants(fused=False), groups=2)
        assert_same(results, EXACT)
        assert_ranks_agree(results)


def test_convolutions_and_batch_norm_follow_ddp_bit_for_bit(run_on_ranks: RunOnRanks) -> None:
    assert_same(run_on_ranks(2, train_all, "conv", "adamw", variants(fused=False)), EXACT)


FUSED = ("adamw", "adamw_amsgrad", "adam", "adam_maximize", "sgd", "sgd_momentum", "sgd_nesterov", "rmsprop")


@pytest.mark.parametrize(
    ("optimizer", "model", "world_size"),
    [
        (optimizer, model, 1 + (number + place) % 2)  # any two of the three come together
        for number, optimizer in enumerate(FUSED)
        for place, model in enumerate(MODELS)
    ],
)
def test_fused_step_follows_ddp(run_on_ranks: RunOnRanks, optimizer: str, model: str, world_size: int) -> None:
    results = run_on_ranks(world_size, train_step_by_step, model, optimizer, variants(fused=True), groups=2)
    assert_same(results, FUSED_ULPS)


@pytest.mark.parametrize(
    ("optimizer", "model", "world_size"),
    [
        (optimizer, model, 3 + (number + place) % 2)  # each optimizer and each model with both numbers of ranks
        for number, optimizer in enumerate(("adamw", "sgd_momentum", "rmsprop"))
        for place, model in enumerate(MODELS)
    ],
)
def test_more_ranks_follow_ddp(run_on_ranks: RunOnRanks, optimizer: str, model: str, world_size: int) -> None:
    results = run_on_ranks(world_size, train_step_by_step, model, optimizer, variants(), groups=3)
    assert_same(results, SUM_ORDER_ULPS)


@pytest.mark.parametrize(
    ("optimizer", "world_size"), [("adamw", 2), ("adamw", 3), ("adamw", 4), ("sgd_momentum", 3), ("rmsprop", 2)]
)
def test_stages_bucket_sizes_and_overlap_do_not_change_a_bit(
    run_on_ranks: RunOnRanks, optimizer: str, world_size: int
) -> None:
    same = [
        {"stage": stage, "bucket_mb": bucket_mb, "overlap": overlap}
        for stage in STAGES
        for bucket_mb, overlap in ((25.0, True), (0.002, True), (0.0001, False))
    ]
    for model in MODELS:
        assert_same(run_on_ranks(world_size, train_all, model, optimizer, same), EXACT)


@pytest.mark.parametrize(
    ("options", "world_size", "model"),
    [
        (options, world_size, list(MODELS)[(number + world_size) % len(MODELS)])  # any two of the three come together
        for number, options in enumerate(
            [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 2, "reduce_dtype": torch.bfloat16}]
        )
        for world_size in (2, 3, 4)
    ],
)
def test_transports_do_not_change_a_bit(
    run_on_ranks: RunOnRanks, options: dict[str, Any], world_size: int, model: str
) -> None:
    same = [{**options, "transport": transport, "bucket_mb": 0.004} for transport in ("pairwise", "shm")]
    if options["stage"] > 0:
        same.append({**options, "share_parameters": True, "bucket_buffers": 3, "bucket_mb": 0.002})
    assert_same(run_on_ranks(world_size, train_all, model, "adamw", same), EXACT)


def step_with_wire_dtype(reduce_dtype: torch.dtype, stage: int) -> tuple[Tensor, Tensor]:
    """One SGD step at a learning rate of 1, and this rank's gradient."""
    weight = nn.Parameter(torch.zeros(1000))
    net = nn.ParameterList([weight])
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(dist.get_rank()))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    _, wrapped = zeroopt.wrap(net, optimizer, stage=stage, reduce_dtype=reduce_dtype, fused=False)
    (weight * gradient).sum().backward()
    wrapped.step()
    return weight.detach().clone(), gradient


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reduce_dtype_rounds_what_travels_and_sums_in_float32(
    run_on_ranks: RunOnRanks, dtype: torch.dtype, stage: int
) -> None:
    results = run_on_ranks(2, step_with_wire_dtype, dtype, stage)
    travelled = [(gradient / 2).to(dtype).float() for _, gradient in results]
    for weight, _ in results:
        assert torch.equal(weight, -(travelled[0] + travelled[1]))


def test_torch_transport_follows_ddp(run_on_ranks: RunOnRanks) -> None:
    results = run_on_ranks(2, train_all, "mlp", "adamw", variants(fused=False, transport="torch"))
    assert_same(results, EXACT)
    assert_same(run_on_ranks(3, train_step_by_step, "lm", "adamw", variants(transport="torch")), SUM_ORDER_ULPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_follow_ddp_bit_for_bit(run_on_ranks: RunOnRanks, dtype: torch.dtype) -> None:
    assert_same(run_on_ranks(2, train_cast, dtype), EXACT)


def train_cast(dtype: torch.dtype) -> list[History]:
    """Plain training of a model that is in another dtype altogether."""
    torch.set_default_dtype(dtype)
    try:
        return train_all("lm", "adamw", variants())
    finally:
        torch.set_default_dtype(torch.float32)
