"""A parameter that is stepped part by part is stepped as so many parameters would be, and its state stays one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lone_slice import config_with, params_of, values
from torch import Tensor, nn
from whole_optimizers import Lars, MuonAndAdam, Shampoo

from zeroopt import ConfigError, Split
from zeroopt.admission.matrix_splits import apply_splits, check_names
from zeroopt.optim import FusedLAMB
from zeroopt.options.splits import read_splits
from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.stepping.part_state import PartState
from zeroopt.stepping.parts import in_parts
from zeroopt.storage.segment import Segment

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "lars": Lars,
    "shampoo": Shampoo,
    "muon by hand": lambda params: MuonAndAdam([{"params": params, "use_muon": True}]),
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["adafactor"] = lambda params: torch.optim.Adafactor(params, lr=0.05)
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda params: torch.optim.Muon(params, lr=0.05)

SPLITS = {
    "rows": (values((12, 6), 0), Split(3)),
    "sizes": (values((12, 6), 1), Split((6, 4, 2))),
    "columns": (values((6, 12), 2), Split(4, dim=1)),
    "columns of sizes, transposed memory": (values((12, 6), 3).t(), Split((6, 2, 4), dim=1)),
}


def whole_segment(value: Tensor, split: Split) -> Segment:
    managed = params_of(value, grain=Grain.MATRIX)[0]
    managed.part_sizes, managed.part_dim = split.sizes("p0", value.shape), split.dim
    return Segment(managed, 0, 0, managed.numel, managed.param, torch.float32)


def step_in_parts(optimizer: torch.optim.Optimizer, segment: Segment, grad: Tensor | None) -> None:
    sizes, dim = segment.owner.part_sizes, segment.owner.part_dim
    group = optimizer.param_groups[0]
    with in_parts(optimizer, [segment]) as leaves_of:
        group["params"] = list(leaves_of[segment])
        for leaf, part in zip(leaves_of[segment], () if grad is None else grad.split(sizes, dim), strict=False):
            leaf.grad = part
        optimizer.step()
    group["params"] = [segment.shard]


@pytest.mark.parametrize("which", SPLITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_as_so_many_parameters(name: str, which: str) -> None:
    value, split = SPLITS[which]
    segment = whole_segment(value, split)
    sizes = segment.owner.part_sizes
    apart = [
        nn.Parameter(part.detach().clone(memory_format=torch.preserve_format)) for part in value.split(sizes, split.dim)
    ]
    optimizer, twin = OPTIMIZERS[name]([segment.shard]), OPTIMIZERS[name](apart)
    before: dict[str, Any] = {}
    for step in range(4):
        grad = None if step == 2 else values(value.shape, 10 + step)
        for param, part in zip(apart, () if grad is None else grad.split(sizes, split.dim), strict=False):
            param.grad = part.clone()
        step_in_parts(optimizer, segment, grad)
        twin.step()
        twin.zero_grad()
        got = segment.shard.detach().split(sizes, split.dim)
        assert all(torch.allclose(a, b.detach(), rtol=1e-5, atol=1e-6) for a, b in zip(got, apart, strict=True))
        state = optimizer.state[segment.shard]
        assert list(optimizer.state) == [segment.shard]
        for param, own in zip(apart, PartState(segment.owner).cut(state), strict=True):
            torch.testing.assert_close(own, dict(twin.state[param]), rtol=1e-5, atol=1e-6)
        for key, entry in state.items():
            if isinstance(entry, Tensor) and entry.dim():
                assert entry.shape == value.shape
                assert step == 0 or entry is before[key] or key not in before, "nothing is copied once it is there"
        before = dict(state)


def test_a_parameter_without_a_gradient_gets_no_state() -> None:
    segment = whole_segment(values((12, 6), 0), Split(3))
    optimizer = Lars([segment.shard])
    step_in_parts(optimizer, segment, None)
    assert not optimizer.state


def managed(*shapes: tuple[int, ...], grain: Grain) -> list[ManagedParam]:
    return params_of(*map(torch.zeros, shapes), grain=grain)


def test_which_parameters_have_parts_and_what_they_cost() -> None:
    params = managed((12, 4), (12, 4), (4,), grain=Grain.MATRIX)
    config = config_with(matrix_splits=read_splits({"p[01]": 3, "p2": [1, 3]}))
    apply_splits(Lars([one.param for one in params]), params, config)
    assert [one.part_sizes for one in params] == [[4, 4, 4], [4, 4, 4], [1, 3]]
    assert params[0].whole_cost == 3 * 16 * 4 and params[2].whole_cost == 4
    assert all(one.is_stepped_in_parts for one in params)
    cut = managed((12, 4), grain=Grain.ELEMENT)
    apply_splits(torch.optim.SGD([cut[0].param], lr=1.0), cut, config)
    assert not cut[0].is_stepped_in_parts


def test_refusals() -> None:
    params = managed((12, 4), grain=Grain.PARAMETER)
    for given, problem in (({"p0": 5}, "does not consist of 5 parts"), ({"p0": Split(2, dim=7)}, "along dimension 7")):
        with pytest.raises(ConfigError, match=problem):
            apply_splits(Lars([params[0].param]), params, config_with(matrix_splits=read_splits(given)))
    with pytest.raises(ConfigError, match="a fused kernel steps the parameters of FusedLAMB whole"):
        apply_splits(FusedLAMB([params[0].param]), params, config_with(matrix_splits=read_splits({"p0": 3})))
    before = Lars([params[0].param])
    before.state[params[0].param] = {"buffer": torch.zeros(12, 4), "rows": torch.zeros(12, 1)}
    with pytest.raises(ConfigError, match="parameter 'p0' has 'rows' of shape \\[12, 1\\], which belongs to all of it"):
        apply_splits(before, params, config_with(matrix_splits=read_splits({"p0": 3})))
    with pytest.raises(ConfigError, match="no parameter of the model is called 'qkv'; there are weight, bias"):
        check_names(nn.Linear(2, 2), config_with(matrix_splits=read_splits({"qkv": 3})))
