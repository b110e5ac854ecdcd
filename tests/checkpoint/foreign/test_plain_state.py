"""What another library has saved becomes the state dict of a plain torch optimizer, which loads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zeroopt.checkpoint.foreign.plain_state import (
    check_shape,
    comparable_options,
    make_step,
    positions_by_group,
    whole_state_dict,
)
from zeroopt.errors import StateError


def params(*numels: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((numel,), 1.0)) for numel in numels]


def grouped(*sizes: int) -> torch.optim.Optimizer:
    """Adam with groups of so many parameters."""
    return torch.optim.Adam([{"params": params(*[2] * size)} for size in sizes], lr=0.5, betas=(0.1, 0.2))


def state(value: float) -> dict[str, Any]:
    return {"step": make_step(3, "a file"), "exp_avg": torch.full((2,), value), "exp_avg_sq": torch.full((2,), value)}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1,), [[0]]), ((2, 1, 3), [[0, 1], [2], [3, 4, 5]]), ((1, 0, 2), [[0], [], [1, 2]])],
)
def test_positions_count_through_the_groups(sizes: tuple[int, ...], expected: list[list[int]]) -> None:
    assert [list(positions) for positions in positions_by_group(grouped(*sizes))] == expected


def test_torch_loads_it() -> None:
    optimizer = grouped(1, 2)
    made = whole_state_dict(optimizer, {2: state(2.0), 0: state(0.5)}, [{"lr": 0.25}, {"weight_decay": 0.125}])
    assert list(made["state"]) == [0, 2]
    optimizer.load_state_dict(made)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.125]
    assert all(group["betas"] == (0.1, 0.2) for group in optimizer.param_groups)
    first, second, third = (param for group in optimizer.param_groups for param in group["params"])
    assert optimizer.state[first]["exp_avg"].tolist() == [0.5, 0.5]
    assert optimizer.state[third]["exp_avg"].tolist() == [2.0, 2.0]
    assert second not in optimizer.state


def test_what_was_saved_is_not_changed_by_the_state_dict() -> None:
    saved = {0: state(1.0)}
    made = whole_state_dict(grouped(1), saved, [{}])
    made["state"][0]["more"] = 1
    assert saved[0].keys() == state(1.0).keys()


def test_each_group_needs_its_options() -> None:
    with pytest.raises(ValueError, match="zip"):
        whole_state_dict(grouped(1, 1), {}, [{}])


def test_only_what_the_optimizer_knows_is_taken_over() -> None:
    own = {"lr": 1.0, "betas": (0.9, 0.99), "foreach": None, "fused": True, "params": [0], "param_names": ["a"]}
    saved = {
        "lr": 0.5,
        "initial_lr": 0.75,
        "foreach": True,
        "fused": False,
        "params": [7],
        "param_names": ["b"],
        "bias_correction": True,
    }
    assert comparable_options(saved, own) == {"lr": 0.5, "initial_lr": 0.75}
    assert comparable_options(saved, []) == {"initial_lr": 0.75}, "which a scheduler puts there"
    assert comparable_options({}, own) == {}


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3), torch.tensor([3.0], dtype=torch.float64)], ids=repr)
def test_a_step_count_is_as_torch_keeps_it(value: Any) -> None:
    step = make_step(value, "a file")
    assert (step.shape, step.dtype, step.device.type, step.item()) == ((), torch.float32, "cpu", 3.0)


def test_what_is_no_step_count_is_refused() -> None:
    with pytest.raises(StateError, match="a file has, as a step count, nan: expected a whole number"):
        make_step(float("nan"), "a file")


def test_a_step_count_has_memory_of_its_own() -> None:
    value = torch.tensor(3.0)
    make_step(value, "a file").add_(1)
    assert value == 3


def test_another_shape_is_of_another_model() -> None:
    check_shape("a", "exp_avg", torch.zeros(2, 3), torch.zeros(2, 3), "file")
    expected = (
        r"file has 'exp_avg' of shape \[3, 2\] for parameter 'a' of shape \[2, 3\]: it was saved with another model"
    )
    with pytest.raises(StateError, match=expected):
        check_shape("a", "exp_avg", torch.zeros(3, 2), torch.zeros(2, 3), "file")
