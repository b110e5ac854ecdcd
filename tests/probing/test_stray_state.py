"""Whatever an optimizer keeps of its parameters outside of `state[param]` is found, and told where it is."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeroopt
from zeroopt.probing.stray_state import find_stray_state

NUMEL = 6  # which nothing else here has


def optimizer_with(**attributes: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(NUMEL))], lr=0.1)
    for name, value in attributes.items():
        setattr(optimizer, name, value)
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def found_in(optimizer: torch.optim.Optimizer) -> str | None:
    return find_stray_state(optimizer, params_of(optimizer), NUMEL)


class Module(nn.Module):
    """Has a parameter."""

    def __init__(self, param: nn.Parameter) -> None:
        super().__init__()
        self.param = param


class Recursive:
    """An object that leads back to itself."""

    def __init__(self, inside: Any = None) -> None:
        self.me, self.inside = self, inside


class Slotted:
    """Has no dict of attributes."""

    __slots__ = ("value",)


WAYS: dict[str, Callable[[nn.Parameter], Any]] = {
    "itself": lambda param: param,
    "list": lambda param: [1, [param]],
    "tuple": lambda param: (param,),
    "set": lambda param: {param},
    "deque": lambda param: deque([param]),
    "value": lambda param: {"a": {"b": param}},
    "key": lambda param: {param: 1},
    "address": lambda param: {id(param): 1},
    "module": Module,
    "object": lambda param: SimpleNamespace(inner=SimpleNamespace(param=param)),
    "cycle": Recursive,
    "weak": weakref.ref,
}


@pytest.mark.parametrize("way", WAYS)
def test_references_to_parameters_are_found_wherever_they_are(way: str) -> None:
    optimizer = optimizer_with()
    (param,) = params_of(optimizer)
    value: Any = WAYS[way](param)  # type: ignore[arg-type]
    optimizer.mine = value  # type: ignore[attr-defined]
    assert found_in(optimizer) == "references to parameters in its attribute 'mine'"
    del optimizer.mine
    optimizer.param_groups[0]["own"] = value
    assert found_in(optimizer) == "references to parameters in the option 'own' of a param_group"


@pytest.mark.parametrize("way", [way for way in WAYS if way != "weak"])
def test_a_tensor_of_as_many_elements_belongs_to_one_of_them(way: str) -> None:
    other = nn.Parameter(torch.zeros(2, 3))
    optimizer = optimizer_with(moments=WAYS[way](other))
    expected = None if way == "address" else "tensors for parameters in its attribute 'moments'"
    assert found_in(optimizer) == expected
    assert find_stray_state(optimizer, params_of(optimizer)) is None, "where it may be anything"


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(256.0),
        torch.zeros(0),
        [1, 2.5, "three", None, True],
        {"betas": (0.9, 0.99)},
        lambda: 1,
        torch.zeros,
        nn.Linear,
        Recursive(),
        Slotted(),
        weakref.ref(Recursive),
        [[[[[[[[[nn.Parameter(torch.zeros(NUMEL))]]]]]]]]],
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_all_else_may_be_kept(value: Any) -> None:
    optimizer = optimizer_with(mine=value)
    optimizer.param_groups[0]["own"] = value
    assert found_in(optimizer) is None
    assert find_stray_state(optimizer, params_of(optimizer)) is None


def test_a_dead_reference_is_none() -> None:
    assert found_in(optimizer_with(mine=weakref.ref(Recursive.__new__(Recursive)))) is None


def test_another_optimizer_is_named_by_its_class() -> None:
    inner = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    assert found_in(optimizer_with(base=[inner])) == "another optimizer, Adam, in its attribute 'base'"


def test_what_every_optimizer_has_is_no_stray_state() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(NUMEL))])
    (param,) = params_of(optimizer)
    param.grad = torch.ones(NUMEL)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.step()
    optimizer.param_groups[0]["param_names"] = ["a"]
    assert found_in(optimizer) is None


def test_fused_optimizers_make_some_attributes_anew() -> None:
    fused = zeroopt.optim.FusedAdamW([nn.Parameter(torch.zeros(NUMEL))])
    params_of(fused)[0].grad = torch.ones(NUMEL)
    fused.step()
    assert found_in(fused) is None


class Wrapped(Tensor):
    """A tensor of a class of its own."""


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"a": torch.zeros(2), "b": [torch.zeros(2), (torch.zeros(2),)], "c": {"d": 1}}, None),
        ({"a": nn.Parameter(torch.zeros(2)), "b": deque([1, 2])}, None),
        ({"a": [torch.zeros(2).as_subclass(Wrapped)]}, "state in tensors of the class Wrapped"),
        ({"a": deque([torch.zeros(2)])}, "tensors of its state in a deque"),
        ({"a": {"b": SimpleNamespace(c=torch.zeros(2))}}, "tensors of its state in a SimpleNamespace"),
        (deque([torch.zeros(2)]), "tensors of its state in a deque"),
    ],
    ids=str,
)
def test_state_has_to_be_of_what_ranks_can_cut(entry: Any, expected: str | None) -> None:
    optimizer = optimizer_with()
    optimizer.state[params_of(optimizer)[0]] = entry
    assert found_in(optimizer) == expected


def test_state_under_another_name_is_told() -> None:
    optimizer = optimizer_with()
    optimizer.state["k"] = 1  # type: ignore[index]
    assert found_in(optimizer) == "state under 'k', which is no parameter,"
