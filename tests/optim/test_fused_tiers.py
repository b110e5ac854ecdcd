"""The fused optimizers in every tier of precision: their state, copies of it, and seeds."""

from __future__ import annotations

import copy
import pickle
from itertools import combinations
from typing import Any

import pytest
import torch
from optim_cases import (
    ALL_CLASSES,
    BF16,
    F16,
    F32,
    FULL,
    INT8,
    STATE_DTYPES,
    STEPS,
    TIER_IDS,
    TIERS,
    TORCH_CLASSES,
    ULPS_A_STEP,
    Params,
    assert_close,
    assert_equal,
    clone,
    expected_dtypes,
    make_params,
    saved_and_loaded,
    set_grads,
    state_names,
    tier_options,
    train,
    two_groups,
    values,
)
from torch import nn

from zeroopt import ConfigError
from zeroopt.optim import FusedAdamW, FusedLAMB, FusedOptimizer, FusedSGD
from zeroopt.state.tiers import decoded


class TestTiers:
    @pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
    @pytest.mark.parametrize(("dtype", "weights"), TIERS, ids=TIER_IDS)
    @pytest.mark.parametrize("cls", ALL_CLASSES)
    def test_state_is_as_documented(
        self, cls: type[FusedOptimizer], dtype: torch.dtype, weights: str, state: torch.dtype
    ) -> None:
        params = make_params(dtype)
        optimizer = cls(params, **tier_options(cls, weights, state))
        train(optimizer, params, 0, 3)
        for param in params:
            assert param.dtype is dtype and bool(param.isfinite().all())
            if not param.numel():
                continue
            entry = optimizer.state[param]
            assert {name: value.dtype for name, value in entry.items()} == expected_dtypes(cls, dtype, weights, state)
            for name, value in entry.items():
                numel = -(-param.numel() // 256)
                scalar_or_scales = () if name == "step" else (numel,) if name.endswith("_scale") else param.shape
                assert value.shape == torch.Size(scalar_or_scales)

    @pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
    @pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
    @pytest.mark.parametrize(("dtype", "weights"), TIERS, ids=TIER_IDS)
    @pytest.mark.parametrize("cls", ALL_CLASSES)
    def test_a_copy_continues_bit_for_bit(
        self,
        cls: type[FusedOptimizer],
        dtype: torch.dtype,
        weights: str,
        state: torch.dtype,
        way: str,
    ) -> None:
        params = make_params(dtype)
        optimizer = cls(two_groups(params), **tier_options(cls, weights, state))
        train(optimizer, params, 0, 3)
        copied, others = copy_of(optimizer, params, way)
        train(optimizer, params, 3, 6)
        train(copied, others, 3, 6)
        assert_equal(others, params)
        assert_equal(copied.state_dict(), optimizer.state_dict())

    @pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
    @pytest.mark.parametrize("cls", ALL_CLASSES)
    def test_remainder_follows_float32_bit_for_bit(self, cls: type[FusedOptimizer], state: torch.dtype) -> None:
        params, others = make_params(BF16), make_params(BF16)
        optimizer = cls(params, **tier_options(cls, "float32", state))
        other = cls(others, **tier_options(cls, "remainder", state))
        for step in range(2 * STEPS):
            train(optimizer, params, step, step + 1)
            train(other, others, step, step + 1)
            assert_equal(others, params)

    @pytest.mark.parametrize(("dtype", "weights"), TIERS[1:], ids=TIER_IDS[1:])
    @pytest.mark.parametrize("cls", TORCH_CLASSES)
    def test_torchs_float32_moments_are_not_rounded_on_the_way_in(
        self, cls: type[torch.optim.Optimizer], dtype: torch.dtype, weights: str
    ) -> None:
        references = make_params()
        theirs = cls(references, **FULL[TORCH_CLASSES[cls]])
        train(theirs, references, 0, 3)
        params = make_params(dtype)
        optimizer = TORCH_CLASSES[cls](params, **tier_options(TORCH_CLASSES[cls], weights, F32))
        optimizer.load_state_dict(theirs.state_dict())
        for param, reference in zip(params, references, strict=True):
            for name, value in theirs.state[reference].items():
                assert_equal(optimizer.state[param][name], value)

    @pytest.mark.parametrize("dtype", [BF16, F16])
    @pytest.mark.parametrize("cls", TORCH_CLASSES)
    def test_masters_follow_torch_in_float32(self, cls: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
        """On the same 16-bit gradients, and the parameter is the master to nearest."""
        params = make_params(dtype)
        references = [nn.Parameter(param.detach().float()) for param in params]
        ours = TORCH_CLASSES[cls](params, **FULL[TORCH_CLASSES[cls]])
        theirs = cls(references, **FULL[TORCH_CLASSES[cls]], foreach=False)
        for step in range(STEPS):
            set_grads(params, step)
            for param, reference in zip(params, references, strict=True):
                reference.grad = None if param.grad is None else param.grad.float()
            ours.step()
            theirs.step()
        for param, reference in zip(params, references, strict=True):
            if param.numel():
                master = ours.state[param]["master_param"]
                assert_close(master, reference, ULPS_A_STEP * STEPS)
                assert_close(param, master.to(dtype), 1)  # ties of bfloat16 go away from zero here

    @pytest.mark.parametrize("in_one_group", [True, False])
    @pytest.mark.parametrize("weights", ["float32", "remainder", "none"])
    def test_mixed_dtypes_step_as_each_alone(self, weights: str, in_one_group: bool) -> None:
        single, half = make_params(F32), make_params(BF16)
        mixed = [*single, *half] if in_one_group else [{"params": single}, {"params": half}]
        optimizer = FusedAdamW(mixed, **tier_options(FusedAdamW, weights, F32))
        alone, half_alone = make_params(F32), make_params(BF16)
        optimizer_alone = FusedAdamW(alone, **tier_options(FusedAdamW, weights, F32))
        # The numbers of stochastic rounding depend on a parameter's place in its optimizer.
        half_optimizer = FusedAdamW([*make_params(F32), *half_alone], **tier_options(FusedAdamW, weights, F32))
        for step in range(STEPS):
            for each in (single, half, alone, half_alone):
                set_grads(each, step)
            for each in (optimizer, optimizer_alone, half_optimizer):
                each.step()
        assert_equal(single, alone)
        assert_equal(half, half_alone)

    @pytest.mark.parametrize("cls", ALL_CLASSES)
    @pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
    def test_stochastic_rounding_depends_on_the_seed_alone(self, cls: type[FusedOptimizer], state: torch.dtype) -> None:
        def run(seed: int, threads: int) -> Params:
            params = [*make_params(BF16), nn.Parameter(values(300, 1000, seed=9, dtype=BF16))]
            torch.set_num_threads(threads)
            options = tier_options(cls, "none", state) | {"seed": seed}
            torch.manual_seed(seed + threads)  # of no importance
            train(cls(params, **options), params, 0, 3)
            return params

        before = torch.get_num_threads()
        try:
            first = run(1, 1)
            assert_equal(run(1, 1), first)
            assert_equal(run(1, 2), first)
            assert_equal(run(1, 3), first)
            assert not torch.equal(run(2, 1)[-1], first[-1])
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("seed", [-1, 2**64])
    def test_seeds_that_do_not_fit_are_refused(self, seed: int) -> None:
        params = make_params()
        with pytest.raises(ConfigError, match="seed"):
            train(FusedAdamW(params, seed=seed), params, 0, 1)

    @pytest.mark.parametrize("state", [F32, BF16], ids=str)
    def test_int8_state_takes_numbers_of_other_state_dtypes(self, state: torch.dtype) -> None:
        params, others = make_params(), make_params()
        optimizer = FusedAdamW(params, state_dtype=state)
        train(optimizer, params, 0, 3)
        other = FusedAdamW(others, state_dtype=INT8)
        other.load_state_dict(optimizer.state_dict())
        train(other, others, 3, 6)
        for param in others:
            if param.numel():
                assert other.state[param]["exp_avg"].dtype is INT8
                assert other.state[param]["exp_avg_sq"].dtype is torch.uint8

    @pytest.mark.parametrize(("saved", "loaded"), [("float32", "remainder"), ("remainder", "float32")])
    def test_masters_of_the_other_kind_are_not_lost(self, saved: str, loaded: str) -> None:
        """Both complete a bfloat16 to the same float32, so training goes on as if nothing had been changed."""
        params, others = make_params(BF16), make_params(BF16)
        optimizer, other = FusedAdamW(params, master_weights=saved), FusedAdamW(others, master_weights=loaded)
        train(optimizer, params, 0, 3)
        with torch.no_grad():
            for param, of_other in zip(params, others, strict=True):
                of_other.copy_(param)
        other.load_state_dict(optimizer.state_dict())
        train(optimizer, params, 3, 9)
        train(other, others, 3, 9)
        assert_equal(others, params)

    @pytest.mark.parametrize(
        "cls", [cls for cls in ALL_CLASSES if cls is not FusedLAMB]
    )  # whose norms are of all elements
    @pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e21, -1e21])
    def test_int8_state_bounds_what_one_gradient_does(self, cls: type[FusedOptimizer], bad: float) -> None:
        """To the elements that it spoils with float32 moments, and no others."""
        spoilt, others = {}, torch.arange(1000) != 300
        for state in (F32, INT8):
            param = nn.Parameter(torch.ones(1000))
            optimizer = cls([param], **tier_options(cls, "float32", state))
            for step in range(4):
                param.grad = values(1000, seed=step)
                if step == 1:
                    param.grad[300] = bad
                optimizer.step()
            spoilt[state] = (~param.isfinite()).nonzero().flatten().tolist()
            moments = decoded(optimizer.state[param])
            assert all(bool(moments[name][others].isfinite().all()) for name in state_names(cls))
        assert spoilt[INT8] == spoilt[F32]

    @pytest.mark.parametrize("cls", TORCH_CLASSES)
    def test_torch_reads_8_bit_moments_as_the_numbers_that_they_are(self, cls: type[torch.optim.Optimizer]) -> None:
        """And what torch has made of them comes back, although scales of what they were stand beside them."""
        options = FULL[TORCH_CLASSES[cls]]
        params, references = make_params(), make_params()
        ours, exact = TORCH_CLASSES[cls](params, **options, state_dtype=INT8), cls(references, **options)
        for optimizer, of_it in ((ours, params), (exact, references)):
            train(optimizer, of_it, 0, 3)
        theirs_params = clone(params)
        theirs = cls(theirs_params, **options)
        theirs.load_state_dict(saved_and_loaded(ours.state_dict()))
        assert_near(theirs, theirs_params, exact, references)
        train(theirs, theirs_params, 3, 9)
        train(exact, references, 3, 9)
        assert_near(theirs, theirs_params, exact, references)
        back = TORCH_CLASSES[cls](theirs_params, **options, state_dtype=INT8)
        back.load_state_dict(saved_and_loaded(theirs.state_dict()))
        again = cls(theirs_params, **options)
        again.load_state_dict(back.state_dict())
        assert_near(again, theirs_params, theirs, theirs_params)

    @pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
    @pytest.mark.parametrize("cls", ALL_CLASSES)
    def test_codes_in_state_dicts_of_earlier_versions(self, cls: type[FusedOptimizer], state: torch.dtype) -> None:
        params = make_params()
        optimizer = cls(two_groups(params), **tier_options(cls, "float32", INT8))
        train(optimizer, params, 0, 3)
        earlier = saved_and_loaded(torch.optim.Optimizer.state_dict(optimizer))
        assert any(value.dtype is INT8 or value.dtype is torch.uint8 for value in earlier["state"][1].values())
        results = []
        for given in (earlier, optimizer.state_dict()):
            others = clone(params)
            other = cls(two_groups(others), **tier_options(cls, "float32", state))
            other.load_state_dict(given)
            train(other, others, 3, 6)
            results.append((others, other.state_dict()))
        assert_equal(*results)

    def test_hooks_see_what_state_dict_gives(self) -> None:
        params = make_params()
        optimizer = FusedAdamW(params, state_dtype=INT8)
        train(optimizer, params, 0, 1)
        seen = []

        def hook(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            seen.append(state_dict["state"][0]["exp_avg"].dtype)
            return {**state_dict, "mine": 1}

        optimizer.register_state_dict_post_hook(hook)
        assert optimizer.state_dict()["mine"] == 1 and seen == [F32]

    def test_torchs_cast_of_a_remainder_is_not_taken_for_one(self) -> None:
        params = make_params(BF16)
        ours = FusedAdamW(params, master_weights="remainder")
        train(ours, params, 0, 3)
        theirs = torch.optim.AdamW(params)
        theirs.load_state_dict(ours.state_dict())
        back = FusedAdamW(clone(params), master_weights="remainder")
        back.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            for param in back.param_groups[0]["params"]:
                param.grad = torch.zeros_like(param)
        back.param_groups[0].update(lr=0.0)
        back.step()
        for param in back.param_groups[0]["params"]:
            if param.numel():
                assert not back.state[param]["remainder"].any()


def assert_near(
    ours: torch.optim.Optimizer, our_params: Params, theirs: torch.optim.Optimizer, their_params: Params
) -> None:
    """Moments of float32 that are as close as 8 bits can be, a few steps later too."""
    for our, their in zip(our_params, their_params, strict=True):
        for name, value in theirs.state[their].items():
            if name != "step" and value.numel():
                got = ours.state[our][name]
                assert got.dtype is F32 and got.shape == value.shape
                assert float((got - value).abs().max()) <= 0.05 * float(value.abs().max()), name


def copy_of(optimizer: FusedOptimizer, params: Params, way: str) -> tuple[torch.optim.Optimizer, Params]:
    """An optimizer in the same state over parameters of its own."""
    if way == "deepcopy":
        copied, others = copy.deepcopy((optimizer, params))
        return copied, others
    if way == "pickle":
        copied, others = pickle.loads(pickle.dumps((optimizer, params)))
        return copied, others
    others = clone(params)
    given = {"master_weights": optimizer.master_weights, "state_dtype": optimizer.state_dtype, "seed": optimizer.seed}
    fresh = type(optimizer)(two_groups(others), **FULL[type(optimizer)], **given)
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return fresh, others


def test_rounding_differs_from_step_to_step_beyond_those_that_float32_counts() -> None:
    """torch's number of steps stops at 2**24, and random numbers that go by it would come again and again."""
    param = nn.Parameter(torch.zeros(1000, dtype=BF16))
    param.grad = torch.randn(1000).to(BF16)
    optimizer = FusedSGD([param], lr=0.1, master_weights="none")
    optimizer.step()
    optimizer.state[param]["step"].fill_(2.0**24)
    results = []
    for _ in range(3):
        param.data.zero_()
        optimizer.step()
        results.append(param.detach().clone())
    assert not any(torch.equal(a, b) for a, b in combinations(results, 2))
    assert optimizer.state[param]["step"] == 2**24 + 4  # of 2**24 + 3 the nearest float32


def test_counting_begins_anew_where_step_is_set_back() -> None:
    """What float32 lacks of 2**24 + 3 is no part of the next count: -1 + 1 steps would be divided by."""
    param = nn.Parameter(torch.zeros(10))
    param.grad = torch.ones(10)
    optimizer = FusedAdamW([param])
    optimizer.step()
    step = optimizer.state[param]["step"]
    step.fill_(2.0**24)
    for _ in range(3):
        optimizer.step()
    step.zero_()
    optimizer.step()
    assert step == 1
    assert bool(param.isfinite().all())
