"""Whole parameters that one kernel steps, each in memory of its own: gradients of any layout, masters, and who may use it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optim_cases import values
from torch import Tensor, nn

from zeroopt import ops
from zeroopt.optim.fused_params import FusedParams, Places
from zeroopt.options.precision import join_master, round_master, split_master
from zeroopt.stepping.rules import rule_for

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MASTERS = [ops.Storage(BF16, "float32", BF16), ops.Storage(F16, "float32", F16), ops.Storage(BF16, "remainder", BF16)]
SHAPES = [(4, 6), (7,), (), (2, 3, 4, 5)]


def params_of(dtype: torch.dtype = F32) -> list[nn.Parameter]:
    made = [values(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(SHAPES)]
    made[0], made[3] = made[0].t(), made[3].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(value) for value in made]


def optimizer_of(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], lr=0.1)


def places_of(optimizer: torch.optim.Optimizer) -> Places:
    found = [(number, param) for number, group in enumerate(optimizer.param_groups) for param in group["params"]]
    return dict(enumerate(found))


def fused(optimizer: torch.optim.Optimizer, storage: ops.Storage | None = None) -> FusedParams:
    rule = rule_for(optimizer)
    assert rule is not None
    return FusedParams(optimizer, rule, storage or ops.Storage(), places_of(optimizer))


def is_current(made: FusedParams, optimizer: torch.optim.Optimizer) -> bool:
    numbers, params = zip(*places_of(optimizer).values(), strict=True)
    return made.is_current(optimizer, params, numbers)


def step(made: FusedParams, optimizer: torch.optim.Optimizer) -> None:
    rule = rule_for(optimizer)
    assert rule is not None
    rows = torch.tensor([rule.hyper_row(group) for group in optimizer.param_groups], dtype=torch.float64)
    made.step_gradients(rows, ops.StepControl())


def give(params: Sequence[nn.Parameter], seed: int, unused: Sequence[int] = ()) -> None:
    for i, param in enumerate(params):
        # Contiguous, whatever the parameter is.
        param.grad = None if i in unused else values(*param.shape, seed=100 * seed + i, dtype=param.dtype)


def test_steps_as_torch_does_in_any_layout() -> None:
    params, twins = params_of(), params_of()
    optimizer, twin = optimizer_of(params), optimizer_of(twins)
    made = fused(optimizer)
    for seed, unused in enumerate([(3,), (), (0,)]):
        give(params, seed, unused)
        give(twins, seed, unused)
        versions = [param._version for param in params]
        step(made, optimizer)
        twin.step()
        changed = [param._version != version for param, version in zip(params, versions, strict=True)]
        assert changed == [i not in unused for i in range(len(params))], "autograd knows"
        for param, other in zip(params, twins, strict=True):
            torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
            mine, theirs = optimizer.state.get(param, {}), twin.state.get(other, {})
            assert list(mine) == list(theirs)
            for name, value in mine.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
                assert name == "step" or value.numel() < 2 or value.stride() == param.stride()
    assert is_current(made, optimizer)


def test_gradients_that_are_negated_lazily_are_resolved() -> None:
    params, twins = [nn.Parameter(torch.ones(3))], [nn.Parameter(torch.ones(3))]
    optimizer, twin = torch.optim.SGD(params, lr=1.0), torch.optim.SGD(twins, lr=1.0)
    negated = torch._neg_view(torch.ones(3))
    assert negated.is_neg()
    params[0].grad, twins[0].grad = negated, negated
    step(fused(optimizer), optimizer)
    twin.step()
    assert torch.equal(params[0], twins[0])


def test_gradients_of_another_dtype_are_not_its_to_step() -> None:
    params = [nn.Parameter(torch.ones(3, dtype=BF16)) for _ in range(2)]
    optimizer = torch.optim.SGD(params, lr=1.0)
    made = fused(optimizer, ops.Storage(BF16, "float32", F32))
    give(params, 0)
    step(made, optimizer)
    assert all(torch.equal(param, torch.ones(3, dtype=BF16)) for param in params)


@pytest.mark.parametrize("storage", MASTERS, ids=str)
def test_masters_follow_torch_in_float32(storage: ops.Storage) -> None:
    params = params_of(storage.param_dtype)
    exact = [nn.Parameter(param.detach().float()) for param in params]
    optimizer, twin = optimizer_of(params), optimizer_of(exact)
    made = fused(optimizer, storage)
    for seed in range(3):
        give(params, seed)
        for param, other in zip(params, exact, strict=True):
            assert param.grad is not None
            other.grad = param.grad.float()
        step(made, optimizer)
        twin.step()
    for param, other in zip(params, exact, strict=True):
        full = exact_of(optimizer.state[param], param)
        torch.testing.assert_close(full, other.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(param, round_master(full, param.dtype))


def exact_of(entry: dict[str, Any], param: Tensor) -> Tensor:
    if "master_param" in entry:
        full: Tensor = entry["master_param"]
        return full
    return join_master(param.detach(), entry["remainder"])


@pytest.mark.parametrize("storage", MASTERS, ids=str)
@pytest.mark.parametrize("kept_as", ["master_param", "remainder"])
def test_masters_come_from_state_of_either_kind(storage: ops.Storage, kept_as: str) -> None:
    full = values(5, 4, seed=3).t()
    rounded = torch.empty_like(full, dtype=storage.param_dtype).copy_(round_master(full, storage.param_dtype))
    param = nn.Parameter(rounded)
    optimizer = torch.optim.AdamW([param])
    optimizer.state[param] = {kept_as: full if kept_as == "master_param" else split_master(full)[1]}
    fused(optimizer, storage)
    entry = optimizer.state[param]
    comes = kept_as == "master_param" or storage.param_dtype is BF16
    assert torch.equal(exact_of(entry, param), full if comes else param.detach().float())
    assert ("master_param" in entry) == (storage.master_weights == "float32")


def test_a_master_does_not_outlive_what_was_written_to_its_parameter() -> None:
    full = values(6, seed=3)
    param = nn.Parameter(round_master(full, BF16))
    with torch.no_grad():
        param[2] = 7
    optimizer = torch.optim.AdamW([param])
    optimizer.state[param] = {"master_param": full.clone()}
    made = fused(optimizer, ops.Storage(BF16, "float32", BF16))
    expected = full.clone()
    expected[2] = 7
    assert torch.equal(optimizer.state[param]["master_param"], expected), "before it was made"
    with torch.no_grad():
        param[4] = -5
    expected[4] = -5
    optimizer.param_groups[0]["lr"] = 0.0
    give([param], 0)
    step(made, optimizer)
    assert torch.equal(optimizer.state[param]["master_param"], expected), "and between steps"


@pytest.mark.parametrize("how", ["data", "state", "optimizer", "copy"])
def test_it_is_current_as_long_as_all_is_where_it_was(how: str) -> None:
    params = params_of()
    optimizer = optimizer_of(params)
    made = fused(optimizer)
    give(params, 0)
    step(made, optimizer)
    assert is_current(made, optimizer)
    other = optimizer
    if how == "data":
        params[0].data = params[0].data.clone()
    elif how == "state":
        optimizer.state[params[0]] = {}
    elif how == "optimizer":
        other = optimizer_of(params)
        other.state = optimizer.state
    else:
        assert copy.deepcopy(made) is made
        other = copy.deepcopy(optimizer)
    assert not is_current(made, other)


@pytest.mark.parametrize(
    ("edit", "expected"), [("added", True), ("moved", False), ("taken out", False), ("replaced", False)]
)
def test_it_is_not_current_where_groups_have_been_edited(edit: str, expected: bool) -> None:
    params = params_of()
    optimizer = optimizer_of(params)
    made = fused(optimizer)
    first, second = (group["params"] for group in optimizer.param_groups)
    if edit == "added":
        second.append(nn.Parameter(torch.zeros(3)))
    elif edit == "moved":
        first.append(second.pop(0))
    elif edit == "taken out":
        second.pop()
    else:
        first[1] = params_of()[1]
    assert is_current(made, optimizer) is expected
