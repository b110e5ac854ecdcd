"""What the functions make is known beforehand, and trying them out changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeroopt
from zeroopt.building.functions import Init, reset_parameters
from zeroopt.building.trial import Call, try_out
from zeroopt.building.unmade import find_unmade


def calls_of(model: nn.Module, *functions: Init) -> list[Call]:
    return try_out(model, functions or (reset_parameters,), find_unmade(model), torch.device("cpu"))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


class WithAngles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)


def test_what_nothing_makes_is_named() -> None:
    with pytest.raises(zeroopt.ConfigError) as raised:
        calls_of(on_meta(lambda: nn.Sequential(WithAngles())))
    for part in ("buffer '0.angles'", "module '0', a WithAngles", "nothing gives it values", "init="):
        assert part in str(raised.value)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(4))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)


def test_what_reset_parameters_leaves_out_is_named() -> None:
    with pytest.raises(zeroopt.ConfigError, match=r"parameter 'shift' of the Custom is on the meta device"):
        calls_of(on_meta(Custom))


def writes_through(how: str) -> Init:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            values = {"data": module.weight.data, "view": module.weight.view(-1)}[how]
            values.normal_()
            module.bias.copy_(torch.ones(4))

    return init


@pytest.mark.parametrize("how", ["data", "view"])
def test_writing_through_other_tensors_counts(how: str) -> None:
    model = on_meta(lambda: nn.Linear(4, 4))
    (call,) = calls_of(model, writes_through(how))
    assert call.overwrites == {model.weight: True, model.bias: True}


def test_reading_is_told_from_overwriting() -> None:
    model = on_meta(lambda: nn.Linear(4, 4, bias=False))

    def halve(module: nn.Module) -> None:
        module.weight.mul_(0.5)

    calls = calls_of(model, reset_parameters, halve)
    assert [call.overwrites[model.weight] for call in calls] == [True, False]


def test_the_first_of_tied_parameters_is_kept() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    first, second, _ = calls_of(on_meta(build))
    assert first.written == second.discarded and not second.written


def test_it_changes_nothing() -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, WithAngles):
            module.angles = torch.rand(4) * random.random()
            module.linear.weight.copy_(torch.rand(4, 4))
            module.linear.bias.zero_()
            module.note = 1

    model = on_meta(WithAngles)
    before, state, python_state = model.angles, torch.get_rng_state(), random.getstate()
    calls_of(model, init)
    assert model.angles is before and not hasattr(model, "note")
    assert torch.equal(state, torch.get_rng_state()) and python_state == random.getstate()


def reads(module: nn.Module) -> None:
    if module.weight.sum().item() > 0:
        module.weight.zero_()


def replaces(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (reads, r"reads of module '' \(Linear\) fails on the meta device.*item"),
        (replaces, "replaces parameter 'weight'"),
    ],
)
def test_functions_that_cannot_be_used_are_refused(init: Init, message: str) -> None:
    with pytest.raises(zeroopt.ConfigError, match=message):
        calls_of(on_meta(lambda: nn.Linear(4, 4)), init)


def test_what_has_values_is_not_written() -> None:
    model = on_meta(lambda: nn.Linear(4, 4))
    model.bias = nn.Parameter(torch.ones(4))
    with pytest.raises(zeroopt.ConfigError, match="writes 'bias', which is not on the meta device"):
        calls_of(model)
    assert torch.equal(model.bias, torch.ones(4))


def test_attributes_on_the_meta_device_are_refused() -> None:
    def build() -> nn.Module:
        model = nn.Linear(4, 4)
        model.table = torch.ones(4)  # type: ignore[assignment]
        return model

    with pytest.raises(zeroopt.ConfigError, match="attribute 'table'.*neither a parameter nor a buffer"):
        calls_of(on_meta(build))

    def init(module: nn.Module) -> None:
        reset_parameters(module)
        values: Tensor = torch.ones(4)
        module.table = values

    calls_of(on_meta(build), init)
