"""The step of every optimizer against its float64 reference and against torch, in every tier of precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import OPS, Op
from step_cases import STORAGES, TOLERANCE, Stored, check_step, expect, random_values, run, storage_name
from torch import Tensor

from zeroopt import ops

OPTIONS = [(name, change) for name, op in OPS.items() for change in op.options]
TORCH_OPTIONS = [(name, change) for name, change in OPTIONS if OPS[name].torch_class is not None]
NUMEL = 1003


def gradient(step: int, numel: int = NUMEL) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(step))


def zero_states(op: Op, numel: int = NUMEL) -> dict[str, Tensor]:
    return random_values(op, numel, 0) | {name: torch.zeros(numel) for name in op.states}


def assert_close(values: Tensor, expected: Tensor, num_steps: int) -> None:
    """Within the roundings of that many steps of values of about 1."""
    tolerance = num_steps * TOLERANCE
    torch.testing.assert_close(values.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPS)
def test_kernels_say_what_they_are(name: str) -> None:
    op, kernel = OPS[name], ops.OPTIMIZERS[name]
    assert kernel.kernels == (op.kernels or (name,))
    assert kernel.columns == tuple(op.defaults)
    assert (kernel.states, kernel.signed) == (op.states, op.signed)
    flags = [None if flag is None else kernel.columns[flag] for flag in kernel.flags]
    assert flags == [op.flags.get(state) for state in op.states]


def test_every_kernel_has_its_cases() -> None:
    assert ops.OPTIMIZERS.keys() == OPS.keys()


class TestFormulas:
    @pytest.mark.parametrize(("name", "change"), OPTIONS, ids=str)
    def test_several_steps_follow_the_reference(self, name: str, change: dict[str, float]) -> None:
        op = OPS[name]
        hyper = op.hyper(**change)
        segment = Stored(op, numel=NUMEL, hyper=hyper, values=zero_states(op))
        steps, exact = torch.zeros(1), segment.values()
        for step in range(1, 6):
            segment.raw["grad"].copy_(gradient(step))
            before = segment.copies()["grad"]
            run([segment], steps=steps)
            exact = expect(op, {**exact, "grad": gradient(step)}, step, hyper)
            for state in ("param", *segment.states):
                assert_close(segment.raw[state], exact[state], step)
            assert steps.item() == step
            assert segment.copies()["grad"] == before
        assert segment.guards_are_intact()

    @pytest.mark.parametrize("step", [10**6 + 1, 2**24 + 3, 2**40 + 1])
    @pytest.mark.parametrize("name", OPS)
    def test_late_steps(self, name: str, step: int) -> None:
        """A million steps on, bias corrections are 1 and no power has come to NaN; and float32 alone could not count them for ever."""
        segment = Stored(OPS[name], numel=NUMEL, hyper=OPS[name].hyper(**({"beta2": 0.999} if name == "adamw" else {})))
        before = segment.values()
        steps = run([segment], steps=torch.tensor([step - 1.0], dtype=torch.float64))
        assert steps.item() == step
        check_step(segment, before, step)

    @pytest.mark.parametrize(("name", "state"), [(name, state) for name, op in OPS.items() for state in op.flags])
    def test_states_that_the_group_does_not_need_stay(self, name: str, state: str) -> None:
        """max_exp_avg_sq without amsgrad and momentum_buffer without momentum, the array being there or not."""
        op = OPS[name]
        flag = op.flags[state]
        with_array, without = Stored(op, hyper=op.hyper(**{flag: 1})), Stored(op, hyper=op.hyper(**{flag: 0}))
        with_array.hyper = without.hyper
        kept = with_array.copies()[state]
        run([with_array])
        run([without])
        assert with_array.copies()[state] == kept
        assert with_array.copies() == without.copies() | {state: kept}

    def test_first_step_of_sgd_overwrites_what_the_buffer_held(self) -> None:
        segment = Stored(OPS["sgd"], hyper=OPS["sgd"].hyper(dampening=0.5, weight_decay=0))
        segment.raw["momentum_buffer"].fill_(torch.nan)
        run([segment], steps=torch.zeros(1))
        assert torch.equal(segment.raw["momentum_buffer"], segment.raw["grad"])
        assert bool(segment.raw["param"].isfinite().all())

    def test_trust_ratio_of_lamb_is_1_where_a_norm_is_0(self) -> None:
        op = OPS["lamb"]
        for changed in ("param", "grad"):
            values = zero_states(op)
            values[changed].zero_()
            segment = Stored(op, values=values, hyper=op.hyper(weight_decay=0))
            before = segment.values()
            run([segment], steps=torch.zeros(1))
            check_step(segment, before, 1)
            moved = (segment.values()["param"] - before["param"]).abs()
            # Moments have forgotten nothing yet: each element's update is g / |g| but for eps.
            assert moved.max() == 0 if changed == "grad" else 0.099 < moved.max() < 0.1


def torch_optimizer(name: str, param: Tensor, hyper: dict[str, float]) -> torch.optim.Optimizer:
    options: dict[str, Any] = dict(hyper)
    if "beta1" in options:
        options["betas"] = (float(options.pop("beta1")), float(options.pop("beta2")))
    for flag in ("amsgrad", "maximize", "nesterov", "centered"):
        if flag in options:
            options[flag] = bool(options[flag])
    class_name = OPS[name].torch_class if options.pop("decoupled", True) else "Adam"
    assert class_name is not None
    optimizer: torch.optim.Optimizer = getattr(torch.optim, class_name)([param], **options)
    return optimizer


@pytest.mark.parametrize(("name", "change"), TORCH_OPTIONS, ids=str)
def test_follows_torch(name: str, change: dict[str, float]) -> None:
    op = OPS[name]
    hyper = op.hyper(**change)
    segment = Stored(op, numel=NUMEL, hyper=hyper, values=zero_states(op))
    theirs = torch.nn.Parameter(segment.raw["param"].clone())
    optimizer = torch_optimizer(name, theirs, hyper)
    steps = torch.zeros(1)
    for step in range(5):
        segment.raw["grad"].copy_(gradient(step))
        theirs.grad = gradient(step)
        run([segment], steps=steps)
        optimizer.step()
    # 10 and 30 roundings of 6e-8, at 1 and at 3.
    torch.testing.assert_close(segment.raw["param"], theirs.detach(), rtol=5e-7, atol=5e-7)
    for state in segment.states:
        torch.testing.assert_close(segment.raw[state], optimizer.state[theirs][state], rtol=1e-6, atol=1e-6)


class TestTiers:
    @pytest.mark.parametrize("storage", STORAGES, ids=storage_name)
    @pytest.mark.parametrize("name", OPS)
    def test_one_step_is_the_reference_with_storage_around_it(self, name: str, storage: ops.Storage) -> None:
        """With every option, each a group, of segments that are no multiples of anything."""
        op = OPS[name]
        segments = [
            Stored(
                op, storage, numel, hyper=op.hyper(**change), seed=group, group=group, key=7 + group, first=97 * group
            )
            for group, (change, numel) in enumerate(zip(op.options, [600, 1, 255, 257] * 3, strict=False))
        ]
        before = [segment.values() for segment in segments]
        seed = 2**63 + 12345
        control = ops.StepControl(grad_scale=torch.tensor(3.0), clip_coef=torch.tensor(0.7), seed=seed)
        run(segments, control=control)
        for segment, values in zip(segments, before, strict=True):
            check_step(segment, values, 3, factor=0.7 / 3, seed=seed)
            assert segment.guards_are_intact()

    @pytest.mark.parametrize("name", OPS)
    def test_the_check_notices_a_small_mistake(self, name: str) -> None:
        """A learning rate, a weight decay or a state that is wrong by a hundredth, or another seed."""
        op = OPS[name]
        for storage in (STORAGES[0], STORAGES[-2]):
            for wrong in ("lr", "weight_decay", *op.states_of(op.hyper()), "seed"):
                if wrong == "seed" and storage is STORAGES[0]:
                    continue
                segment = Stored(op, storage, 5000)
                before = segment.values()
                run([segment])
                if wrong in op.defaults:
                    segment.hyper = op.hyper(**{wrong: op.defaults[wrong] * 1.01})
                elif wrong in before:
                    before[wrong] *= 1.01
                with pytest.raises(AssertionError):
                    check_step(segment, before, 3, seed=int(wrong == "seed"))
