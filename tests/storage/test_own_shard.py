"""State at home on another device than the parameters: gradients are fetched, parameters published, and no bit changes.

On the CPU, `cpu:0` stands for that device: torch takes it for another one than `cpu`, so all that lies there has memory of its
own. `pytest -m cuda` keeps state of a model on a GPU in the memory of the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from state_cases import assert_alike
from torch import Tensor
from training import batch, build, loss_of, optimizer_for, snapshot
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.storage.own_shard import OwnShard

BF16, F16, INT8 = torch.bfloat16, torch.float16, torch.int8
ELSEWHERE = torch.device("cpu", 0)

TIERS: dict[str, dict[str, Any]] = {
    "own step": {"fused": False},
    "own step, float32 master": {"param_dtype": F16, "fused": False},
    "kernel": {"fused": True},
    "float32 master": {"param_dtype": BF16},
    "remainder": {"param_dtype": BF16, "master_weights": "remainder"},
    "no master, int8": {"param_dtype": BF16, "master_weights": "none", "state_dtype": INT8},
}


def check_where(optimizer: zeroopt.ZeroOptimizer, home: torch.device | None) -> None:
    """State lies at home and, where that is elsewhere, shares no memory with the buckets."""
    replica = optimizer.replica
    for bucket, store in zip(replica.buckets, replica.reducer.stores, strict=True):
        shard, full = OwnShard(bucket, store), bucket.flat_param
        assert shard.master.is_away == (home is not None)
        begin, end = full.data_ptr(), full.data_ptr() + full.nbytes
        assert (begin <= shard.master.param.data_ptr() < end) == (home is None)
        assert (shard.grad.data_ptr() == store.reduced.data_ptr()) == (home is None)
        assert torch.equal(shard.master.param, bucket.own_param), "the bucket has what was stepped"


def train(
    options: dict[str, Any], home: torch.device | None, device: str = "cpu", model_name: str = "lm"
) -> tuple[list[list[Tensor]], dict[str, Any], list[Tensor]]:
    """Parameters after each of some steps, between which they are also written and loaded; whole state; exact parameters."""
    history = []
    net = build(model_name).to(device)
    model, optimizer = zeroopt.wrap(
        net, optimizer_for("adamw", net, groups=2), bucket_mb=0.001, state_device=home, **options
    )
    for step in range(5):
        loss_of(model(batch(model_name, step).to(device))).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(snapshot(net))
        check_where(optimizer, home)
        if step == 1:
            with torch.no_grad(), model.write_parameters():
                for param in net.parameters():
                    param.mul_(1.5)
        elif step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
        elif step == 3:
            model.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    optimizer.consolidate_state_dict()
    whole = optimizer.full_state_dict() if optimizer.replica.control.rank == 0 else {}
    return history, whole, [optimizer.full_parameter(param) for param in net.parameters()]


def train_in_both_places(options: dict[str, Any]) -> list[tuple[list[list[Tensor]], dict[str, Any], list[Tensor]]]:
    return [train(options, home) for home in (None, ELSEWHERE)]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("tier", TIERS)
def test_state_elsewhere_changes_no_bit(run_on_ranks: RunOnRanks, tier: str, stage: int) -> None:
    for here, elsewhere in run_on_ranks(2, train_in_both_places, {"stage": stage, **TIERS[tier]}):
        assert_alike(here, elsewhere)


def test_gradients_are_clipped_elsewhere_too(run_on_ranks: RunOnRanks) -> None:
    """Their norm is added up in another order, as the gradients stay where the model is."""
    options = {"stage": 2, "param_dtype": BF16, "max_grad_norm": 0.01}
    for (history, *_, exact), (other_history, *_, other_exact) in run_on_ranks(2, train_in_both_places, options):
        torch.testing.assert_close(exact, other_exact, rtol=1e-5, atol=1e-7)
        assert len(history) == len(other_history)


def average_in_both_places(stage: int) -> list[list[Tensor]]:
    return [
        train({"stage": stage, "average_every": 2, **tier}, home)[2]
        for tier in TIERS.values()
        for home in (None, ELSEWHERE)
    ]


def test_averages_are_the_same(run_on_ranks: RunOnRanks) -> None:
    for results in run_on_ranks(2, average_in_both_places, 2):
        assert_alike(results[::2], results[1::2])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("tier", ["own step", "kernel", "remainder"])
def test_state_of_a_model_on_a_gpu_lies_in_host_memory(tier: str) -> None:
    net = build("mlp").to("cuda")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=2, state_device="cpu", **TIERS[tier])
    for step in range(3):
        loss_of(model(torch.randn(4, 7, device="cuda") + step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    arrays = [value for entry in optimizer.state.values() for value in entry.values()]
    assert arrays and {array.device.type for array in arrays} == {"cpu"}
    assert all(param.is_cuda and param.isfinite().all() for param in net.parameters())
    for bucket in optimizer.replica.buckets:
        assert torch.equal(bucket.own_param.cpu(), bucket.master.param)
