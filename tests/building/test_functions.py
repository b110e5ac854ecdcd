"""Which functions give modules their values, and in which order modules get them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeroopt
from zeroopt.building.functions import as_functions, in_order_of_construction, reset_parameters
from zeroopt.building.unmade import find_unmade


def test_parts_come_before_what_they_are_parts_of() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    order = list(in_order_of_construction(model, find_unmade(model)))
    assert order == [model[0].out_proj, model[0], model[1][0], model[1], model]


def test_what_has_values_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    assert list(in_order_of_construction(model, find_unmade(model))) == [model[1], model]


def test_a_function_several_or_none() -> None:
    assert as_functions(None) == (reset_parameters,)
    assert as_functions(print) == (print,)
    assert as_functions([reset_parameters, print]) == (reset_parameters, print)


@pytest.mark.parametrize("init", [3, ["zeros"], "model.pt"])
def test_other_things_are_refused(init: object) -> None:
    with pytest.raises(zeroopt.ConfigError, match="expected init to be a function of a module"):
        as_functions(init)  # type: ignore[arg-type]
