"""The norm of a model whose parts lie on several ranks counts every element once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

if not hasattr(pytest.importorskip("torch.distributed.tensor"), "DTensor"):
    pytest.skip("needs torch 2.5", allow_module_level=True)

import parallel
from parallel import PLANS, backward, square_mesh, whole_params, wrap_split
from torch.distributed.tensor import DTensor
from worker_pool import RunOnRanks

from zeroopt.collectives import ControlGroup
from zeroopt.gradients.norm_groups import NormGroups

STEPS = 2


def clip_split_model(plan: str, norm_type: float) -> tuple[list[float], list[list[float]], float]:
    """Norms in one process, norms of each stage, and the largest difference of clipped parameters."""
    mesh = square_mesh()
    clip = (0.05, norm_type)
    expected_norms, expected = parallel.train_alone(parallel.sgd, torch.float64, STEPS, clip)
    norms, error = [], 0.0
    for stage in (0, 1, 2):
        net, model, optimizer = wrap_split(plan, mesh, parallel.sgd, torch.float64, stage=stage)
        found = []
        for step in range(STEPS):
            backward(model, mesh, step)
            found.append(optimizer.clip_grad_norm_(*clip).item())
            optimizer.step()
            optimizer.zero_grad()
            for value, want in zip(whole_params(net), expected[step], strict=True):
                error = max(error, (value - want).abs().max().item())
        norms.append(found)
    return expected_norms, norms, error


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_clipping_a_split_model(run_on_ranks: RunOnRanks, plan: str, norm_type: float) -> None:
    ranks = run_on_ranks(4, clip_split_model, plan, norm_type)
    for expected, norms, error in ranks:
        assert norms == ranks[0][1]
        assert error < 1e-9
        for found in norms:
            assert found == pytest.approx(expected, rel=1e-6)  # the norm is returned as float32


def weigh_buckets() -> list[tuple[bool, float]]:
    """Whether the parameters of a bucket are parts, and what its gradients count for."""
    mesh = square_mesh()
    net, _, optimizer = wrap_split("sequence", mesh)
    split = {p for p in net.parameters() if isinstance(p, DTensor) and any(place.is_shard() for place in p.placements)}
    weights = []
    for bucket in optimizer._trained.buckets:
        kinds = {managed.param in split for managed in bucket.params}
        assert len(kinds) == 1, "parameters that count differently must not share a bucket"
        weights.append((kinds.pop(), bucket.norm_weight))
    return weights


def test_weights(run_on_ranks: RunOnRanks) -> None:
    for weights in run_on_ranks(4, weigh_buckets):
        assert set(weights) == {(True, 1.0), (False, 0.5)}


def combine() -> tuple[float, float, float]:
    """Over rows, then over columns of the mesh: over all ranks."""
    mesh = square_mesh()
    groups = NormGroups([ControlGroup(mesh["tp"].get_group()), ControlGroup(mesh["dp"].get_group())])
    rank = torch.tensor(float(dist.get_rank()), dtype=torch.float64)
    nan = torch.tensor(math.nan if dist.get_rank() == 2 else 1.0, dtype=torch.float64)
    return groups.sum_over_model(rank).item(), groups.max_over_model(rank).item(), groups.max_over_model(nan).item()


def test_sums_and_maxima_over_the_model(run_on_ranks: RunOnRanks) -> None:
    for total, largest, nan in run_on_ranks(4, combine):
        assert (total, largest) == (6.0, 3.0)
        assert math.isnan(nan)


def test_without_other_parts_nothing_is_exchanged() -> None:
    value = torch.tensor(2.0)
    assert NormGroups([]).sum_over_model(value) is value
    assert NormGroups([]).max_over_model(value) is value
