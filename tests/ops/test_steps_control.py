"""What all segments of a step have in common, and numbers that a step must bear: NaN, infinities, the tiny and the huge."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import OPS
from step_cases import (
    FEW_STORAGES,
    FLOAT32,
    HALVES,
    STORAGES,
    Stored,
    check_step,
    expect,
    random_values,
    run,
    storage_name,
)
from torch import Tensor

from tests.ops.test_steps import TORCH_OPTIONS, torch_optimizer, zero_states
from zeroopt import ops

ALONE = [name for name in OPS if name != "lamb"]  # whose steps of an element depend on no other
each_op = pytest.mark.parametrize("name", OPS)
each_storage = pytest.mark.parametrize("storage", FEW_STORAGES, ids=storage_name)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@each_op
@each_storage
class TestControl:
    @pytest.mark.parametrize(("grad_scale", "clip_coef"), [(2.0**16, 1), (1, 0.25), (2.0**-3, 0.5), (1, 1)])
    def test_powers_of_two_are_as_if_gradients_had_been_scaled(
        self, name: str, storage: ops.Storage, grad_scale: float, clip_coef: float
    ) -> None:
        """Bit for bit, of gradients that are so in 16 bits too."""
        op = OPS[name]
        values = random_values(op, 5000, seed=0)
        values["grad"] = values["grad"].mul(32).round().clamp(-128, 128) / 64
        segment = Stored(op, storage, values=values)
        scaled = Stored(op, storage, values=values | {"grad": values["grad"] / grad_scale * clip_coef})
        before = segment.copies()["grad"]
        run([segment], control=ops.StepControl(scalar(grad_scale), scalar(clip_coef)))
        run([scaled])
        assert segment.copies() == scaled.copies() | {"grad": before}

    def test_either_may_be_left_out(self, name: str, storage: ops.Storage) -> None:
        for control in (ops.StepControl(grad_scale=scalar(2)), ops.StepControl(clip_coef=torch.tensor([0.5]))):
            segment, both = Stored(OPS[name], storage), Stored(OPS[name], storage)
            run([segment], control=control)
            run([both], control=ops.StepControl(scalar(1), scalar(0.5)))
            assert segment.copies() == both.copies()

    def test_other_factors(self, name: str, storage: ops.Storage) -> None:
        for grad_scale, clip_coef in ((3.0, 1.0), (1.0, 0.3), (0.7, 0.9)):
            segment = Stored(OPS[name], storage, 1000)
            before = segment.values()
            run([segment], control=ops.StepControl(scalar(grad_scale), scalar(clip_coef), seed=1))
            check_step(segment, before, 3, factor=clip_coef / grad_scale, seed=1)

    @pytest.mark.parametrize("found_inf", [1.0, 0.5, -1.0, math.inf, math.nan, 1e-45])
    def test_found_inf_writes_nothing_at_all(self, name: str, storage: ops.Storage, found_inf: float) -> None:
        segments = [Stored(OPS[name], storage, numel, seed=numel) for numel in (1, 300, 50_000)]
        for segment in segments:
            segment.raw["grad"][0] = math.inf
        before = [segment.everything() for segment in segments]
        scalars = scalar(2.0), scalar(0.5), scalar(found_inf)
        steps = run(segments, control=ops.StepControl(*scalars))
        assert [segment.everything() for segment in segments] == before
        assert steps.tolist() == [2, 2, 2]
        assert [tensor.item() for tensor in scalars[:2]] == [2, 0.5]

    @pytest.mark.parametrize("found_inf", [0.0, -0.0])
    def test_found_inf_of_0_steps(self, name: str, storage: ops.Storage, found_inf: float) -> None:
        segment, plain = Stored(OPS[name], storage), Stored(OPS[name], storage)
        assert run([segment], control=ops.StepControl(found_inf=scalar(found_inf))).item() == 3
        run([plain])
        assert segment.copies() == plain.copies()

    def test_seeds_matter_where_something_is_random_only(self, name: str, storage: ops.Storage) -> None:
        results = []
        for seed in (0, 1):
            segment = Stored(OPS[name], storage, 1000)
            run([segment], control=ops.StepControl(seed=seed))
            results.append(segment.copies())
        unsigned_codes = storage.state_dtype is torch.int8 and not all(OPS[name].signed)
        is_random = storage.master_weights == "none" or storage.state_dtype is torch.bfloat16 or unsigned_codes
        assert (results[0] != results[1]) is is_random


SPECIAL = [math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-45, -1e-42, 1e-38, 1e-20, 1e19, -0.0, 0.0]


class TestSpecialGradients:
    @pytest.mark.parametrize("numel", [len(SPECIAL), 100])
    @pytest.mark.parametrize(("name", "change"), TORCH_OPTIONS, ids=str)
    def test_do_what_they_do_in_torch(self, name: str, change: dict[str, float], numel: int) -> None:
        """In a whole vector of elements and in what is left over, and in the steps after."""
        op = OPS[name]
        hyper = op.hyper(**change)
        segment = Stored(op, numel=numel, hyper=hyper, values=zero_states(op, numel))
        theirs = torch.nn.Parameter(segment.raw["param"].clone())
        optimizer = torch_optimizer(name, theirs, hyper)
        steps = torch.zeros(1)
        for step in range(3):
            segment.raw["grad"].fill_(1)
            if step == 1:
                segment.raw["grad"][-len(SPECIAL) :] = torch.tensor(SPECIAL)
            theirs.grad = segment.raw["grad"].clone()
            run([segment], steps=steps)
            optimizer.step()
        torch.testing.assert_close(segment.raw["param"], theirs.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
        for state in segment.states:
            torch.testing.assert_close(
                segment.raw[state], optimizer.state[theirs][state], rtol=1e-6, atol=1e-6, equal_nan=True
            )

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        "name", [name for name, op in OPS.items() if not op.kernels]
    )  # LAMB's step depends on all elements
    @pytest.mark.parametrize("storage", STORAGES, ids=storage_name)
    def test_spoil_their_own_element_only(self, storage: ops.Storage, name: str, bad: float) -> None:
        """In 8 bits too, but for the scale of their block, to which they no longer add."""
        at, numel = 300, 700
        good, spoilt = Stored(OPS[name], storage, numel), Stored(OPS[name], storage, numel)
        spoilt.raw["grad"][at] = bad
        run([good])
        run([spoilt])
        others = torch.arange(numel) != at
        assert torch.equal(good.raw["param"][others], spoilt.raw["param"][others])
        assert spoilt.raw["param"][at].isfinite() == (name == "lion" and not math.isnan(bad))
        if storage.has_scales:
            others = torch.arange(numel) // 256 != at // 256
        run([good])
        run([spoilt])
        assert torch.equal(good.values()["param"][others], spoilt.values()["param"][others])
        for state in good.states:
            assert torch.equal(good.values()[state][others], spoilt.values()[state][others])
            finite = spoilt.values()[state].isfinite()
            assert not finite[at]
            assert int(finite.sum()) == numel - 1

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_of_lamb_spoil_their_own_element_only(self, bad: float) -> None:
        """The trust ratio cannot be known then, and is 1."""
        segment = Stored(OPS["lamb"])
        segment.raw["grad"][5] = bad
        run([segment])
        assert segment.raw["param"].isnan().nonzero().flatten().tolist() == [5]

    def test_a_nan_reaches_the_maximum_of_amsgrad(self) -> None:
        segment = Stored(OPS["adamw"], numel=4, hyper=OPS["adamw"].hyper(amsgrad=1))
        segment.raw["grad"][2] = math.nan
        run([segment])
        assert segment.raw["max_exp_avg_sq"].isnan().tolist() == [False, False, True, False]
        assert segment.raw["param"].isnan().tolist() == [False, False, True, False]

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize(
        "name", [name for name, op in OPS.items() if not op.kernels]
    )  # LAMB's step depends on all elements
    def test_every_16_bit_gradient(self, name: str, dtype: torch.dtype) -> None:
        """The same as that gradient in float32."""
        op = OPS[name]
        grad = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        values = zero_states(op, grad.numel())
        results = []
        for storage in (ops.Storage(grad_dtype=dtype), FLOAT32):
            segment = Stored(op, storage, values=values)
            segment.raw["grad"].copy_(grad)
            run([segment])
            results.append(segment.raw["param"])
        assert torch.equal(results[0].isnan(), results[1].isnan())
        assert torch.equal(results[0].nan_to_num(0), results[1].nan_to_num(0))


class TestExtremes:
    @each_storage
    @each_op
    def test_tiny_gradients(self, name: str, storage: ops.Storage) -> None:
        """Whose squares are 0 in float32, and which are subnormal themselves; 8-bit blocks of them are 0."""
        op = OPS[name]
        for size in (1e-20, 1e-40):
            values = zero_states(op, 1000) | {"grad": torch.full((1000,), size)}
            segment = Stored(op, storage, values=values)
            before = segment.values()
            run([segment], steps=torch.zeros(1))
            moved = (segment.values()["param"] - before["param"]).abs()
            decayed = 0.1 * op.defaults["weight_decay"] * before["param"].abs()
            if name == "lamb":  # all that is left of the update is the decay, whose ratio to the parameter is trusted
                decayed = 0.1 * before["param"].abs()
            # A step of Lion is the rate however small the gradient; that of others is where the decay is in the gradient. The
            # first one of a centered RMSprop is divided by the root of alpha * (1 - alpha).
            limit = {"lion": 0.1, "adagrad": 0.1, "rmsprop": 0.1 / 0.3}.get(name, 0.0)
            assert moved.isfinite().all()
            assert (moved <= decayed + limit + 1e-3 + before["param"].abs() / 128).all()

    @each_op
    @pytest.mark.parametrize("lr", [1e10, 1e30])
    def test_huge_rates(self, name: str, lr: float) -> None:
        op = OPS[name]
        segment = Stored(op, numel=1000, hyper=op.hyper(lr=lr, weight_decay=0))
        before = segment.values()
        run([segment])
        expected = expect(op, before, 3, segment.hyper)["param"]
        size = expected.abs().mean()
        assert size > lr / 1000
        assert ((segment.values()["param"] - expected).abs() <= 1e-5 * size).all()

    @each_op
    def test_overflow_is_infinite_not_wrong(self, name: str) -> None:
        op = OPS[name]
        values = {array: torch.ones(100) for array in ("param", "grad", *op.states)}
        segment = Stored(op, values=values, hyper=op.hyper(lr=1e39, weight_decay=0))
        run([segment])
        assert (segment.raw["param"] == -math.inf).all()

    @pytest.mark.parametrize("name", ["adamw", "lamb"])
    def test_beta2_next_to_1(self, name: str) -> None:
        """1 - beta2 is below what float32 can subtract from 1; the correction of the first steps undoes it."""
        op = OPS[name]
        for beta2 in (1 - 1e-6, 1 - 1e-9, 1 - 1e-12):
            segment = Stored(op, numel=1000, hyper=op.hyper(beta2=beta2), values=zero_states(op, 1000))
            steps, exact = torch.zeros(1), segment.values()
            for step in range(1, 4):
                run([segment], steps=steps)
                exact = expect(op, {**exact, "grad": segment.raw["grad"]}, step, segment.hyper)
                torch.testing.assert_close(segment.raw["param"].double(), exact["param"], rtol=3e-6, atol=3e-6)

    @each_op
    def test_an_infinite_parameter_does_not_spoil_its_states(self, name: str) -> None:
        """0 times infinity is not taken."""
        op = OPS[name]
        options = [{"weight_decay": 0.0}] + ([{"decoupled": 1.0}] if name == "adamw" else [])
        for change in [*options, *({**option, "maximize": 1.0} for option in options)]:
            segment = Stored(op, hyper=op.hyper(**change))
            segment.raw["param"][1] = math.inf
            run([segment])
            if name != "lamb":  # whose norm is infinite then
                assert segment.raw["param"].isfinite().sum() == 99
            assert all(segment.raw[state].isfinite().all() for state in segment.states)
