"""A kernel steps a rank's part of a bucket as torch steps whole parameters; its state lies side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone_slice import LoneSlice, LoneStep, values
from torch import Tensor

from zeroopt import ops
from zeroopt.options.precision import Precision
from zeroopt.plan.params import Grain
from zeroopt.stepping.bucket_kernel import BucketKernel
from zeroopt.stepping.rules import rule_for
from zeroopt.storage.factors import scale_sums

BEFORE = [values((70,), 0), values((5, 9), 1).t(), values((), 2), values((33, 13), 3)]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)


class Kernel:
    """The only bucket of a rank, and its kernel."""

    def __init__(self, index: int = 0, num_slices: int = 1, precision: Precision | None = None, **options: Any) -> None:
        precision = Precision() if precision is None else precision
        self.step = LoneStep(BEFORE, adamw, LoneSlice(num_slices, index), precision=precision, **options)
        (self.shard,) = self.step.shards
        storage = precision.storage(self.shard.bucket.dtype, self.shard.grad_dtype)
        rule = rule_for(self.step.optimizer)
        assert rule is not None and storage is not None
        self.rule = rule
        self.kernel = BucketKernel([self.shard], storage, rule, self.step.optimizer)

    def run(self, active: Tensor, seed: int = 0) -> None:
        rows = [self.rule.hyper_row(group) for group in self.step.optimizer.param_groups]
        groups = torch.tensor(rows, dtype=torch.float64)
        self.kernel.step_params(active.tolist(), groups, ops.StepControl(seed=seed))

    def state(self, index: int) -> dict[str, Any]:
        (shard,) = [segment.shard for segment in self.step.segments() if segment.owner.index == index]
        entry: dict[str, Any] = self.step.optimizer.state[shard]
        return entry


@pytest.mark.parametrize("index", range(3))
def test_steps_a_slice_as_torch_steps_the_whole(index: int) -> None:
    made = Kernel(index, 3)
    for number in range(3):
        active = made.step.backward(number, unused={3} if number == 1 else ())
        made.run(active)
        made.step.twin.step()
    made.step.assert_follows(BEFORE)
    for segment in made.step.segments():
        entry, twin = made.state(segment.owner.index), made.step.twin.state[made.step.twins[segment.owner.index]]
        assert list(entry) == list(twin) and float(entry["step"]) == float(twin["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            part = segment.owner.flatten(twin[name])[segment.start : segment.start + segment.numel]
            torch.testing.assert_close(entry[name], part, rtol=1e-5, atol=1e-7)


def test_state_lies_side_by_side_as_the_parameters_do() -> None:
    made = Kernel()
    made.run(made.step.backward(0))
    own = made.shard.bucket.own_param.data_ptr()
    for name in ("exp_avg", "exp_avg_sq"):
        apart = {
            made.state(segment.owner.index)[name].data_ptr() - own - segment.offset * 4
            for segment in made.step.segments()
        }
        assert len(apart) == 1


def test_whole_parameters_have_state_of_their_shape() -> None:
    made = Kernel(grain=Grain.PARAMETER)
    made.run(made.step.backward(0))
    made.step.twin.step()
    made.step.assert_follows(BEFORE)
    for index, value in enumerate(BEFORE):
        shown = made.state(index)["exp_avg"]
        assert shown.shape == value.shape and shown.stride() == value.stride()
        torch.testing.assert_close(shown, made.step.twin.state[made.step.twins[index]]["exp_avg"])


def test_factors_of_the_sum_are_multiplied_by_on_the_way() -> None:
    made = Kernel()
    active = made.step.backward(0)
    for store in made.step.stores:
        scale_sums([store], torch.tensor(0.5))
    for twin in made.step.twins:
        assert twin.grad is not None
        twin.grad *= 0.5
    sums = made.shard.grad.clone()
    made.run(active)
    made.step.twin.step()
    made.step.assert_follows(BEFORE)
    torch.testing.assert_close(made.state(0)["exp_avg"], made.step.twin.state[made.step.twins[0]]["exp_avg"])
    assert torch.equal(made.shard.grad, sums), "the sum itself stays"


def test_state_of_8_bits_has_scales_for_its_part() -> None:
    made = Kernel(precision=Precision(state_dtype=torch.int8))
    made.run(made.step.backward(0))
    for index, value in enumerate(BEFORE):
        entry = made.state(index)
        assert list(entry) == ["step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"]
        assert entry["exp_avg"].dtype is torch.int8 and entry["exp_avg_sq"].dtype is torch.uint8
        assert entry["exp_avg_scale"].shape == (ops.num_blocks(value.numel()),)
        grad = made.step.twins[index].grad
        assert grad is not None
        decoded = torch.empty(value.numel())
        ops.dequantize(entry["exp_avg"].contiguous(), entry["exp_avg_scale"].clone(), decoded)
        largest = grad.abs().max() * 0.1
        torch.testing.assert_close(
            decoded, made.step.params[index].flatten(grad) * 0.1, rtol=0, atol=largest.item() / 20
        )


@pytest.mark.parametrize("cut", [1, 2])
def test_stochastic_rounding_does_not_depend_on_how_parameters_are_cut(cut: int) -> None:
    precision = Precision(torch.bfloat16, "none")
    whole = Kernel(precision=precision)
    whole.run(whole.step.backward(0), seed=7)
    parts = [Kernel(index, cut, precision) for index in range(cut)]
    for part in parts:
        part.run(part.step.backward(0), seed=7)
        for segment in part.step.segments():
            expected = segment.owner.flatten(whole.step.params[segment.owner.index].local)
            got = segment.owner.flatten(segment.owner.local)
            begin, end = segment.start, segment.start + segment.numel
            assert torch.equal(got[begin:end], expected[begin:end])


@pytest.mark.parametrize("what", ["seed", "position"])
def test_stochastic_rounding_depends_on_the_seed_and_the_parameters_position(what: str) -> None:
    one, other = (Kernel(precision=Precision(torch.bfloat16, "none")) for _ in range(2))
    if what == "position":
        for managed in other.step.params:
            managed.position += 1
    one.run(one.step.backward(0), seed=7)
    other.run(other.step.backward(0), seed=8 if what == "seed" else 7)
    pairs = zip(one.step.params, other.step.params, strict=True)
    assert not all(torch.equal(first.local, second.local) for first, second in pairs)
