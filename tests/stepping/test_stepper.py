"""Buckets are stepped by a kernel where there is one, and else by the optimizer itself; nobody else may step it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone_slice import LoneSlice, LoneStep, config_with, params_of, values
from torch import Tensor

from zeroopt import ConfigError, KernelUnavailableError, StateError, ops
from zeroopt.options.precision import Precision
from zeroopt.stepping.bucket_kernel import BucketKernel
from zeroopt.stepping.stepper import ShardStepper, check_fused

BF16, F64 = torch.bfloat16, torch.float64
BEFORE = [values((70,), 0), values((5, 9), 1), values((9,), 2), values((33, 3), 3)]
WITH_FLOAT64 = [*BEFORE[:2], *(value.to(F64) for value in BEFORE[2:])]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.1)


def adadelta(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adadelta(groups, lr=0.5)


def stepper_of(step: LoneStep, **options: Any) -> ShardStepper:
    stepper = ShardStepper(step.optimizer, 0, config_with(**options))
    stepper.attach(step.buckets, step.stores)
    return stepper


@pytest.fixture
def kernel_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the buckets that a kernel has stepped."""
    names: list[str] = []
    original = BucketKernel.step_params

    def noted(self: BucketKernel, *args: Any) -> None:
        names.extend(bucket.name for bucket in self.buckets)
        original(self, *args)

    monkeypatch.setattr(BucketKernel, "step_params", noted)
    return names


@pytest.mark.parametrize(
    ("make", "fused", "by_kernel"),
    [(adamw, "auto", True), (adamw, True, True), (adamw, False, False), (adadelta, "auto", False)],
)
@pytest.mark.parametrize("index", range(2))
def test_follows_torch(kernel_steps: list[str], make: Any, fused: Any, by_kernel: bool, index: int) -> None:
    step = LoneStep(BEFORE, make, LoneSlice(2, index), bucket_bytes=300)
    stepper = stepper_of(step, fused=fused)
    for number in range(3):
        active = step.backward(number, unused={1} if number == 1 else ())
        assert list(stepper.step(active)) == step.buckets[::-1], "those that a forward needs first come first"
        step.twin.step()
    step.assert_follows(BEFORE)
    assert len(step.buckets) > 1 and len(kernel_steps) == (3 * len(step.buckets) if by_kernel else 0)


def test_each_bucket_comes_as_soon_as_it_is_stepped() -> None:
    step = LoneStep(BEFORE, adamw, bucket_bytes=300)
    steps = stepper_of(step).step(step.backward(0))
    before = [bucket.own_param.clone() for bucket in step.buckets]
    first = next(steps)
    changed = [not torch.equal(b.own_param, old) for b, old in zip(step.buckets, before, strict=True)]
    assert changed == [bucket is first for bucket in step.buckets]


@pytest.mark.parametrize("fused", [True, False])
def test_a_bucket_alone_steps_as_among_all(fused: bool) -> None:
    both = [LoneStep(WITH_FLOAT64 if fused else BEFORE, adamw, bucket_bytes=300) for _ in range(2)]
    together, alone = (stepper_of(step, fused="auto" if fused else False) for step in both)
    for number in range(2):
        list(together.step(both[0].backward(number)))
        flags = both[1].backward(number).tolist()
        for bucket in both[1].buckets:
            others = [other.own_param.clone() for other in both[1].buckets if other is not bucket]
            alone.step_bucket(bucket, flags)
            rest = (other.own_param for other in both[1].buckets if other is not bucket)
            assert all(map(torch.equal, rest, others))
    for one, other in zip(*(step.buckets for step in both), strict=True):
        assert torch.equal(one.own_param, other.own_param)
    assert len(both[0].buckets) > 1


def test_some_buckets_by_the_kernel_and_others_not(kernel_steps: list[str]) -> None:
    step = LoneStep(WITH_FLOAT64, adamw)
    stepper = stepper_of(step)
    for number in range(2):
        stepped = list(stepper.step(step.backward(number)))
        step.twin.step()
    step.assert_follows(WITH_FLOAT64)
    assert {bucket.dtype for bucket in stepped} == {torch.float32, F64}
    assert kernel_steps == [bucket.name for bucket in step.buckets if bucket.dtype is not F64] * 2


def test_options_are_those_of_the_groups_as_they_are_now() -> None:
    step = LoneStep(BEFORE, adamw)
    stepper = stepper_of(step)
    for number in range(3):
        list(stepper.step(step.backward(number)))
        step.twin.step()
        for optimizer in (step.optimizer, step.twin):
            optimizer.param_groups[0]["lr"] *= 3
            optimizer.param_groups[1]["betas"] = (0.5, 0.7)
    step.assert_follows(BEFORE)


def test_state_that_was_replaced_is_gone_by() -> None:
    step = LoneStep(BEFORE, adamw)
    stepper = stepper_of(step)
    list(stepper.step(step.backward(0)))
    step.twin.step()
    for segment in step.segments():
        twin = step.twin.state[step.twins[segment.owner.index]]
        twin["exp_avg"].mul_(-3)
        step.optimizer.state[segment.shard] = {
            name: value.flatten().clone() if value.dim() else value.clone() for name, value in twin.items()
        }
    stepper.reload_state()
    list(stepper.step(step.backward(1)))
    step.twin.step()
    step.assert_follows(BEFORE)


def test_without_buckets_there_is_nothing_to_step() -> None:
    step = LoneStep(BEFORE, adamw)
    stepper = ShardStepper(step.optimizer, 3, config_with())
    assert stepper.seed == 3
    assert list(stepper.step(torch.ones(4, dtype=torch.uint8))) == []


def test_a_method_of_the_optimizer_writes_all_segments() -> None:
    step = LoneStep(WITH_FLOAT64, adamw)
    with torch.no_grad():
        stepper_of(step).apply(lambda o: [leaf.fill_(7) for group in o.param_groups for leaf in group["params"]])
    assert all((managed.param == 7).all() for managed in step.params), "whichever way a bucket is stepped"


@pytest.mark.parametrize("make", [adamw, adadelta])
def test_the_wrapped_optimizer_steps_for_nobody_else(make: Any) -> None:
    step = LoneStep(BEFORE, make)
    stepper = stepper_of(step)
    with pytest.raises(StateError, match=f"this {type(step.optimizer).__name__} was wrapped by zeroopt.wrap"):
        step.optimizer.step()
    for managed in step.params:
        managed.param.grad = torch.zeros_like(managed.param)
    list(stepper.step(step.backward(0)))
    stepper.refusal.remove()
    step.optimizer.step()


def refused(make: Any = adamw, dtype: torch.dtype = torch.float32, **options: Any) -> str:
    params = params_of(values((3,), dtype=dtype))
    optimizer = make([managed.param for managed in params])
    try:
        check_fused(optimizer, params, config_with(**options))
    except ConfigError as error:
        return str(error)
    return ""


WANTED: dict[str, dict[str, Any]] = {
    "fused=True": {"fused": True},
    "state_dtype=torch.int8": {"precision": Precision(state_dtype=torch.int8)},
    "master_weights='none'": {"precision": Precision(BF16, "none")},
}


@pytest.mark.parametrize("wanted", WANTED)
def test_what_needs_a_kernel_is_refused_where_there_is_none(wanted: str) -> None:
    options = WANTED[wanted]
    assert refused(**options) == ""
    assert refused(adadelta, **options).startswith(
        f"{wanted}: there is no fused kernel for Adadelta with these options, only for AdamW, Adam, "
    )
    if wanted != "fused=True":
        assert refused(fused=False, **options) == f"{wanted} needs a fused kernel, and fused=False forbids it"


def test_dtypes_without_a_kernel_are_refused_by_name() -> None:
    assert refused(dtype=F64, fused=True).startswith(
        "fused=True: parameter 'p0' is torch.float64, for which there is no fused kernel"
    )
    assert refused(dtype=BF16, fused=True).startswith("fused=True: parameter 'p0' is torch.bfloat16")
    assert refused(dtype=BF16, fused=True, precision=Precision(BF16)) == ""


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"precision": Precision(BF16)}], ids=str)
def test_what_needs_no_kernel_takes_any_optimizer(options: dict[str, Any]) -> None:
    assert refused(adadelta, F64, **options) == ""


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parameters are stepped, there are none."""
    monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    monkeypatch.setattr(ops, "missing_kernels", lambda device: "because of something")


@pytest.mark.parametrize("precision", [Precision(), Precision(BF16)], ids=str)
def test_without_kernels_the_optimizer_steps_itself(
    kernel_steps: list[str], no_kernels: None, precision: Precision
) -> None:
    step = LoneStep(BEFORE, adamw, bucket_bytes=300)
    assert refused(precision=precision) == ""
    list(stepper_of(step).step(step.backward(0)))
    step.twin.step()
    step.assert_follows(BEFORE)
    assert kernel_steps == []


@pytest.mark.parametrize("wanted", WANTED)
def test_what_needs_a_kernel_is_refused_on_a_device_without_any(no_kernels: None, wanted: str) -> None:
    with pytest.raises(KernelUnavailableError) as error:
        refused(**WANTED[wanted])
    assert str(error.value) == f"{wanted} needs a fused kernel, and there is none for cpu: because of something"


def test_state_is_keyed_by_segments_whichever_way_they_are_stepped() -> None:
    for make in (adamw, adadelta):
        step = LoneStep(BEFORE, make)
        list(stepper_of(step).step(step.backward(0, unused={2})))
        used: set[Tensor] = {segment.shard for segment in step.segments() if segment.owner.index != 2}
        assert set(step.optimizer.state) == used
