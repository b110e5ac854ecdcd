"""The state of segments that one kernel steps: made when it is called for, shown live, and taken over from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lone_slice import values
from torch import Tensor, nn

from zeroopt import ops
from zeroopt.stepping.rules import rule_for
from zeroopt.stepping.segments import FusedSegments, StateArray

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
NUMELS = (300, 1, 7)


class Loose(FusedSegments):
    """1-D parameters, each with memory of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, storage: ops.Storage | None = None) -> None:
        rule = rule_for(optimizer)
        assert rule is not None
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.arrays: dict[tuple[int, str], StateArray] = {}
        groups = [number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        super().__init__(optimizer, rule, storage or ops.Storage(), self.params, groups, torch.device("cpu"))

    def _arrays(self, i: int) -> ops.SegmentArrays:
        return ops.SegmentArrays(self.params[i].detach(), group=self._group_of[i], key=i)

    def _state(self, i: int, name: str) -> StateArray | None:
        return self.arrays.get((i, name))

    def _make_state(self, i: int, name: str, dtype: torch.dtype) -> StateArray:
        numel = self.params[i].numel()
        scales = torch.zeros(ops.num_blocks(numel)) if self._storage.has_scales else None
        made = self.arrays[i, name] = torch.zeros(numel, dtype=dtype), scales
        return made

    def run(self, grads: Sequence[Tensor | None]) -> None:
        active = torch.tensor([grad is not None for grad in grads], dtype=torch.uint8)
        groups = torch.tensor([self._rule.hyper_row(g) for g in self._optimizer.param_groups], dtype=torch.float64)
        self.step(active, groups, ops.StepControl(), grads)


class Pair:
    """An optimizer stepped by a kernel, and another one like it by torch."""

    def __init__(self, cls: Any, storage: ops.Storage | None = None, **options: Any) -> None:
        self.optimizer, self.twin = (
            cls([{"params": params[:2]}, {"params": params[2:]}], **options)
            for params in ([nn.Parameter(values((n,), n)) for n in NUMELS] for _ in range(2))
        )
        self.loose = Loose(self.optimizer, storage)

    def step(self, seed: int, unused: Sequence[int] = ()) -> None:
        grads = [None if i in unused else values((n,), 100 * seed + i) for i, n in enumerate(NUMELS)]
        self.loose.run(grads)
        for param, grad in zip(self.params(self.twin), grads, strict=True):
            param.grad = grad
        self.twin.step()

    @staticmethod
    def params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        return [param for group in optimizer.param_groups for param in group["params"]]

    def assert_alike(self) -> None:
        for param, twin in zip(self.loose.params, self.params(self.twin), strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)
            mine, theirs = self.optimizer.state.get(param, {}), self.twin.state.get(twin, {})
            assert {name for name, value in mine.items() if value is not None} == {
                name for name, value in theirs.items() if value is not None
            }
            for name, value in mine.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.1}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.25}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "centered": True}),
}


@pytest.mark.parametrize("case", [case for case in CASES if case != "adagrad"])
def test_state_begins_with_the_first_step_as_under_torch(case: str) -> None:
    cls, options = CASES[case]
    pair = Pair(cls, **options)
    assert not pair.optimizer.state
    for seed, unused in enumerate([(0, 1, 2), (1,), (), (0,)]):
        pair.step(seed, unused)
        pair.assert_alike()
    assert pair.loose.still_shows()


@pytest.mark.parametrize("case", CASES)
def test_state_of_torch_is_taken_over(case: str) -> None:
    cls, options = CASES[case]
    pair = Pair(cls, **options)
    for seed in range(2):
        for param, twin in zip(pair.loose.params, pair.params(pair.twin), strict=True):
            param.grad = twin.grad = values(param.shape, seed)
        pair.optimizer.step()
        pair.twin.step()
    pair.loose = Loose(pair.optimizer)
    pair.assert_alike()
    pair.step(5, unused=[1])
    pair.assert_alike()


def test_what_is_shown_is_live() -> None:
    pair = Pair(torch.optim.AdamW)
    pair.step(0)
    for optimizer in (pair.optimizer, pair.twin):
        for number, param in enumerate(pair.params(optimizer)):
            optimizer.state[param]["exp_avg"].fill_(number + 1)
            optimizer.state[param]["step"] += 5
    entries = [pair.optimizer.state[param] for param in pair.loose.params]
    pair.step(1)
    pair.assert_alike()
    assert all(pair.optimizer.state[param] is entry for param, entry in zip(pair.loose.params, entries, strict=True))


def test_options_that_are_turned_on_later_bring_their_state() -> None:
    pair = Pair(torch.optim.SGD, lr=0.1)
    pair.step(0)
    for optimizer in (pair.optimizer, pair.twin):
        optimizer.param_groups[1].update(momentum=0.9, dampening=0.5)  # from its second step on
    for seed in (1, 2):
        pair.step(seed)
        pair.assert_alike()
    names = [set(pair.optimizer.state.get(param, {})) for param in pair.loose.params]
    assert names == [set(), set(), {"momentum_buffer"}]


def test_state_that_is_called_for_later_is_shown_beside_the_rest() -> None:
    pair = Pair(torch.optim.AdamW)
    pair.step(0)
    first = pair.loose.params[0]
    kept = pair.optimizer.state[first]["exp_avg"].data_ptr()
    pair.optimizer.param_groups[0]["amsgrad"] = True
    pair.loose.run([values((n,), n) for n in NUMELS])
    entry = pair.optimizer.state[first]
    assert list(entry) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert entry["exp_avg"].data_ptr() == kept and float(entry["step"]) == 2
    assert torch.equal(entry["max_exp_avg_sq"], entry["exp_avg_sq"])
    assert "max_exp_avg_sq" not in pair.optimizer.state[pair.loose.params[2]]


def test_state_begins_where_the_group_says() -> None:
    pair = Pair(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.25)
    pair.optimizer.state.clear()  # torch makes it before the first step
    pair.loose = Loose(pair.optimizer)
    for seed in range(2):
        pair.step(seed)
        pair.assert_alike()


def test_a_step_without_gradients_changes_nothing() -> None:
    pair = Pair(torch.optim.AdamW)
    before = [param.detach().clone() for param in pair.loose.params]
    pair.loose.run([None] * 3)
    assert not pair.optimizer.state
    assert all(map(torch.equal, pair.loose.params, before))


@pytest.mark.parametrize("how", ["cleared", "entry replaced", "array replaced", "array added", "entry added"])
def test_state_that_somebody_has_replaced_is_noticed(how: str) -> None:
    pair = Pair(torch.optim.AdamW)
    pair.step(0, unused=[2])
    state, (first, _, last) = pair.optimizer.state, pair.loose.params
    assert pair.loose.still_shows()
    if how == "cleared":
        state.clear()
    elif how == "entry replaced":
        state[first] = dict(state[first])
    elif how == "array replaced":
        state[first]["exp_avg"] = state[first]["exp_avg"].clone()
    elif how == "array added":
        state[first]["mine"] = 1
    else:
        state[last] = {"step": torch.tensor(1.0)}
    assert not pair.loose.still_shows()


def test_an_empty_entry_of_what_was_not_stepped_is_no_replacement() -> None:
    pair = Pair(torch.optim.AdamW)
    pair.step(0, unused=[2])
    pair.optimizer.state[pair.loose.params[2]] = {}
    assert pair.loose.still_shows()


@pytest.mark.parametrize("state_dtype", [BF16, INT8])
def test_state_of_few_bits_is_taken_over_as_numbers_or_as_it_is_stored(state_dtype: torch.dtype) -> None:
    storage = ops.Storage(state_dtype=state_dtype)
    pair = Pair(torch.optim.AdamW, storage)
    pair.step(0)
    stored = {param: dict(pair.optimizer.state[param]) for param in pair.loose.params}
    for param, entry in stored.items():
        pair.optimizer.state[param] = {name: value.clone() for name, value in entry.items()}
    Loose(pair.optimizer, storage)
    for param, entry in stored.items():
        shown = pair.optimizer.state[param]
        assert list(shown) == list(entry) and all(torch.equal(shown[name], entry[name]) for name in entry)
    for param in pair.loose.params:
        moments = {name: values(param.shape, 9).abs() for name in ("exp_avg", "exp_avg_sq")}
        pair.optimizer.state[param] = {"step": torch.tensor(4.0), **moments}
    Loose(pair.optimizer, storage)
    for param in pair.loose.params:
        shown = pair.optimizer.state[param]
        assert float(shown["step"]) == 4
        for name in ("exp_avg", "exp_avg_sq"):
            got = shown[name].float()
            if state_dtype is INT8:
                ops.dequantize(shown[name], shown[name + "_scale"], got)
            atol = values(param.shape, 9).abs().max().item() / 20
            torch.testing.assert_close(got, values(param.shape, 9).abs(), rtol=0, atol=atol)


def test_codes_of_8_bits_become_numbers_where_state_has_more() -> None:
    pair = Pair(torch.optim.AdamW, ops.Storage(state_dtype=INT8))
    pair.step(0)
    expected = []
    for param in pair.loose.params:
        entry = pair.optimizer.state[param]
        numbers = torch.empty(param.numel())
        ops.dequantize(entry["exp_avg"], entry["exp_avg_scale"], numbers)
        expected.append(numbers)
    Loose(pair.optimizer)
    for param, numbers in zip(pair.loose.params, expected, strict=True):
        entry = pair.optimizer.state[param]
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq"] and torch.equal(entry["exp_avg"], numbers)


def test_numbers_that_come_with_their_scales_give_the_very_codes() -> None:
    storage = ops.Storage(state_dtype=INT8)
    pair = Pair(torch.optim.AdamW, storage)
    pair.step(0)
    codes = []
    for param in pair.loose.params:
        entry = pair.optimizer.state[param]
        codes.append(entry["exp_avg_sq"].clone())
        numbers = torch.empty(param.numel())
        ops.dequantize(entry["exp_avg_sq"], entry["exp_avg_sq_scale"], numbers)
        pair.optimizer.state[param] = {**entry, "exp_avg_sq": numbers}
    Loose(pair.optimizer, storage)
    for param, expected in zip(pair.loose.params, codes, strict=True):
        assert torch.equal(pair.optimizer.state[param]["exp_avg_sq"], expected) and expected.any()


def test_sgd_shows_a_step_where_random_numbers_depend_on_it() -> None:
    pair = Pair(torch.optim.SGD, ops.Storage(state_dtype=BF16), momentum=0.9)
    for seed in range(2):
        pair.step(seed)
    assert [float(pair.optimizer.state[param]["step"]) for param in pair.loose.params] == [2, 2, 2]
