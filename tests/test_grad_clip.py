"""Clipping gives what DistributedDataParallel and torch.nn.utils.clip_grad_norm_ give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from training import batch, build, loss_of, optimizer_for, prepare, snapshot
from worker_pool import RunOnRanks

import zeroopt


def train_clipped(
    options: dict[str, Any] | None, max_norm: float, norm_type: float, micro_batches: int
) -> tuple[list[float], list[Tensor]]:
    """Norms found in each step, and the parameters at the end."""
    net = build("lm")
    # Plain SGD: what clipping does to a gradient shows in the parameters as it is.
    model, optimizer = prepare(net, optimizer_for("sgd", net), options)
    norms = []
    for step in range(3):
        for micro in range(micro_batches):
            loss_of(model(batch("lm", 10 * step + micro))).backward()
        if options is None:
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm, norm_type)
        else:
            assert isinstance(optimizer, zeroopt.ZeroOptimizer)
            norm = optimizer.clip_grad_norm_(max_norm, norm_type)
            assert norm.shape == () and norm.dtype == torch.float32
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, snapshot(net)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_follows_ddp(run_on_ranks: RunOnRanks, world_size: int, norm_type: float, max_norm: float) -> None:
    expected_norms, expected = run_on_ranks(world_size, train_clipped, None, max_norm, norm_type, 2)[0]
    for stage in (0, 1, 2):
        options = {"stage": stage, "bucket_mb": 0.002}
        ranks = run_on_ranks(world_size, train_clipped, options, max_norm, norm_type, 2)
        assert all(norms == ranks[0][0] for norms, _ in ranks)
        for norms, values in ranks:
            assert norms == pytest.approx(expected_norms, rel=1e-5)
            for want, got in zip(expected, values, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def clip_after(what: str) -> float:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net))
    if what == "zero_grad":
        loss_of(model(batch("mlp", 0))).backward()
        optimizer.zero_grad()
    elif what == "no_sync":
        with model.no_sync():
            loss_of(model(batch("mlp", 0))).backward()
    elif what == "nan" and dist.get_rank() == 0:
        (loss_of(model(batch("mlp", 0))) * float("nan")).backward()
    elif what == "nan":
        loss_of(model(batch("mlp", 0))).backward()
    return optimizer.clip_grad_norm_(1.0, -1.0 if what == "norm_type" else 2.0).item()


def test_nothing_to_clip(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, clip_after, "nothing") == [0.0, 0.0]
    assert run_on_ranks(2, clip_after, "zero_grad") == [0.0, 0.0]


def test_a_nan_on_one_rank_is_seen_by_all(run_on_ranks: RunOnRanks) -> None:
    assert all(math.isnan(norm) for norm in run_on_ranks(2, clip_after, "nan"))


def test_refusals(run_on_ranks: RunOnRanks) -> None:
    for error in run_on_ranks.outcomes(2, clip_after, "no_sync"):
        assert error.type_name == "StateError" and "no_sync" in error.message
    for error in run_on_ranks.outcomes(2, clip_after, "norm_type"):
        assert error == ("ConfigError", "expected norm_type to be positive or inf, got -1.0")
