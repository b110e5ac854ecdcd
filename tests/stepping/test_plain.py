"""An optimizer's own step on a rank's segments does there what it does on whole parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone_slice import LoneSlice, LoneStep, values
from torch import Tensor

from zeroopt.options.precision import Precision
from zeroopt.plan.params import Grain
from zeroopt.stepping.plain import call_on_leaves, step_plain
from zeroopt.storage.factors import scale_sums

BEFORE = [values((70,), 0), values((5, 9), 1).t(), values((), 2), values((33, 3), 3)]
MASTERS = [Precision(), Precision(torch.bfloat16), Precision(torch.float16)]


def made(index: int = 0, num_slices: int = 1, **options: Any) -> LoneStep:
    return LoneStep(
        BEFORE, lambda groups: torch.optim.Adadelta(groups, lr=0.5), LoneSlice(num_slices, index), **options
    )


@pytest.mark.parametrize("precision", MASTERS, ids=str)
@pytest.mark.parametrize("index", range(2))
def test_steps_a_slice_as_the_whole(index: int, precision: Precision) -> None:
    step = made(index, 2, precision=precision, bucket_bytes=200)
    assert len(step.buckets) > 1 and step.segments()
    for number in range(3):
        active = step.backward(number, unused={3} if number == 1 else ())
        step_plain(step.optimizer, step.shards, active.tolist())
        step.twin.step()
    if precision.param_dtype is None:
        step.assert_follows(BEFORE)
    else:
        step.assert_follows(BEFORE, rtol=0.05)  # the twin's gradients are those that the bucket has
    assert all(segment.shard.grad is None for segment in step.segments())
    assert set(step.optimizer.state) == {segment.shard for segment in step.segments()}


def test_whole_parameters_are_stepped_in_their_shape() -> None:
    step = made(grain=Grain.PARAMETER)
    step_plain(step.optimizer, step.shards, step.backward(0).tolist())
    step.twin.step()
    step.assert_follows(BEFORE)
    shapes = {
        segment.owner.name: step.optimizer.state[segment.shard]["square_avg"].shape for segment in step.segments()
    }
    assert shapes == {f"p{i}": value.shape for i, value in enumerate(BEFORE)}


def test_parameters_without_a_gradient_are_left_alone() -> None:
    step = made()
    step_plain(step.optimizer, step.shards, step.backward(0, unused={0, 1, 2, 3}).tolist())
    step.assert_follows(BEFORE)
    assert not step.optimizer.state


def test_factors_of_the_sum_are_multiplied_by() -> None:
    step = made()
    active = step.backward(0)
    for store in step.stores:
        scale_sums([store], torch.tensor(0.5))
    for twin in step.twins:
        twin.grad *= 0.5
    step_plain(step.optimizer, step.shards, active.tolist())
    step.twin.step()
    step.assert_follows(BEFORE)


def test_hooks_of_a_users_step_are_not_called() -> None:
    step = made()
    step.optimizer.register_step_pre_hook(lambda *_: pytest.fail("called"))
    step_plain(step.optimizer, step.shards, step.backward(0).tolist())


def test_leaves_take_the_place_of_parameters_for_the_call_alone() -> None:
    step = made(1, 2)
    groups = list(step.optimizer.param_groups)
    lists = [group["params"] for group in groups]
    seen: list[list[Tensor]] = []

    def method(optimizer: torch.optim.Optimizer) -> None:
        assert all(one is other for one, other in zip(optimizer.param_groups, groups, strict=True))
        seen.extend(list(group["params"]) for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            for leaf in group["params"]:
                leaf.data.fill_(7)

    call_on_leaves(step.optimizer, method, step.shards)
    assert [group["params"] for group in step.optimizer.param_groups] == lists
    assert all(group["params"] is one for group, one in zip(step.optimizer.param_groups, lists, strict=True))
    for number, leaves in enumerate(seen):
        expected = [segment.shard for segment in step.segments() if segment.owner.group == number]
        assert all(one is other for one, other in zip(leaves, expected, strict=True))
    for bucket in step.buckets:
        for segment in bucket.segments:
            assert segment.part_of(bucket.own_param).unique().tolist() == [7]


@pytest.mark.parametrize("precision", MASTERS[1:], ids=str)
def test_what_the_call_writes_is_rounded_for_the_model(precision: Precision) -> None:
    step = made(precision=precision)
    with torch.no_grad():
        call_on_leaves(
            step.optimizer, lambda o: [p.fill_(1 / 3) for g in o.param_groups for p in g["params"]], step.shards
        )
    assert precision.param_dtype is not None
    for managed in step.params:
        assert (managed.param == torch.tensor(1 / 3).to(precision.param_dtype)).all()


def test_parameters_are_back_when_the_call_fails() -> None:
    step = made()
    lists = [group["params"] for group in step.optimizer.param_groups]

    def fail(optimizer: torch.optim.Optimizer) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call_on_leaves(step.optimizer, fail, step.shards)
    assert all(group["params"] is one for group, one in zip(step.optimizer.param_groups, lists, strict=True))
