"""The fused optimizers in a training script written for torch's: scalers, schedulers, hooks, groups, and what is refused."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from optim_cases import (
    ALL_CLASSES,
    BF16,
    F16,
    F32,
    INT8,
    STEPS,
    TIER_IDS,
    TIERS,
    TORCH_CLASSES,
    ULPS_A_STEP,
    Params,
    assert_close,
    assert_equal,
    clone,
    make_params,
    set_grads,
    tier_options,
    train,
    values,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from worker_pool import RunOnRanks

from zeroopt import ConfigError, NotSupportedError
from zeroopt.optim import FusedAdamW, FusedLAMB, FusedOptimizer, FusedSGD

SCALED: dict[str, tuple[type[FusedOptimizer], dict[str, Any]]] = {
    "adamw": (FusedAdamW, {"lr": 1e-2}),
    "sgd": (FusedSGD, {"lr": 1e-1, "momentum": 0.9}),
    "lamb": (FusedLAMB, {"lr": 1e-2}),
}


def step_dtensor() -> str:
    """What the step of a plain parameter and a DTensor is refused with; the plain one stays as it was."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    mesh = tensor.init_device_mesh("cpu", (1,))
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(tensor.distribute_tensor(torch.ones(4), mesh))]
    optimizer = FusedAdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(NotSupportedError) as refused:
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.ones(4))
    return str(refused.value)


class TestGradScaler:
    """torch.amp.GradScaler leaves the division by its scale and the skipping to the kernel."""

    @staticmethod
    def loss(params: Params, step: int) -> Tensor:
        return torch.stack([(p.float() * values(*p.shape, seed=step)).sum() for p in params]).sum().square() * 1e-3

    @pytest.mark.parametrize("unscale_first", [False, True])
    @pytest.mark.parametrize("name", SCALED)
    def test_scaled_training_is_unscaled_training(self, name: str, unscale_first: bool) -> None:
        cls, options = SCALED[name]
        params, others = make_params(), make_params()
        plain, scaled = cls(params, **options), cls(others, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)  # a power of two rounds nothing
        for step in range(STEPS):
            for optimizer in (plain, scaled):
                optimizer.zero_grad()
            self.loss(params, step).backward()
            plain.step()
            scaler.scale(self.loss(others, step)).backward()
            if unscale_first:
                scaler.unscale_(scaled)
            scaler.step(scaled)
            scaler.update()
            assert_equal(others, params)
        assert scaler.get_scale() == 1024.0 * 4

    @pytest.mark.parametrize("unscale_first", [False, True])
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("name", SCALED)
    def test_an_infinite_gradient_skips_the_step(self, name: str, dtype: torch.dtype, unscale_first: bool) -> None:
        if dtype is F16 and unscale_first:
            pytest.skip("torch refuses to unscale float16 gradients")
        cls, options = SCALED[name]
        params = make_params(dtype)
        optimizer = cls(params, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.zeros(()))  # makes the scale
        for first in (True, False):  # without state yet, and with it
            if not first:
                train(optimizer, params, 0, 2)
            set_grads(params, 3)
            before, state_before = clone(params), copy.deepcopy(optimizer.state_dict()["state"])
            params[-1].grad = torch.zeros_like(params[-1])
            params[-1].grad[7] = torch.inf
            if unscale_first:
                scaler.unscale_(optimizer)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == scale / 2
            assert_equal(params, before)
            if first:
                assert all(float(entry.get("step", 0)) == 0 for entry in optimizer.state.values())
            else:
                assert_equal(optimizer.state_dict()["state"], state_before)

    @pytest.mark.parametrize("name", SCALED)
    def test_a_skipped_first_step_leaves_no_trace(self, name: str) -> None:
        cls, options = SCALED[name]
        params, others = make_params(), make_params()
        plain, scaled = cls(params, **options), cls(others, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        for param in others:
            param.grad = torch.full_like(param, torch.nan)
        scaler.step(scaled)
        scaler.update()
        train(plain, params, 0, 3)
        train(scaled, others, 0, 3)
        assert_equal(others, params)

    def test_float16_gradients_are_divided_in_float32(self) -> None:
        """A gradient that float16 holds only while it is scaled."""
        param = nn.Parameter(torch.zeros(4, dtype=F16))
        optimizer = FusedSGD([param], lr=2.0**20)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        scaler.scale(torch.zeros(()))
        param.grad = torch.full((4,), 2.0**-14, dtype=F16)
        scaler.step(optimizer)
        assert torch.equal(param.detach(), torch.full((4,), -(2.0**-10), dtype=F16))


class TestDropIn:
    """What training loops do with an optimizer besides stepping it."""

    @staticmethod
    def pair(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> list[Any]:
        """Torch's and ours, over equal parameters: [(optimizer, params), (optimizer, params)]."""
        options = {"lr": 1e-2, **options}
        both = [(make, make_params()) for make in (kind, TORCH_CLASSES[kind])]
        return [(make(params, **options), params) for make, params in both]

    @staticmethod
    def assert_together(pair: list[Any], steps: int) -> None:
        for theirs, ours in zip(pair[0][1], pair[1][1], strict=True):
            assert_close(ours, theirs, ULPS_A_STEP * steps)

    @pytest.mark.parametrize("cls", TORCH_CLASSES)
    def test_groups_added_after_some_steps(self, cls: type[torch.optim.Optimizer]) -> None:
        pair = self.pair(cls, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
        for optimizer, params in pair:
            train(optimizer, params, 0, 3)
            more = [nn.Parameter(values(41, seed=5)), nn.Parameter(values(2, 3, seed=6))]
            optimizer.add_param_group({"params": more, "lr": 0.05})
            params.extend(more)
            try:
                train(optimizer, params, 3, 7)
            except KeyError:
                if isinstance(optimizer, FusedOptimizer):
                    raise
                pytest.skip("this torch's own Adagrad cannot step groups that are added later")
        self.assert_together(pair, 7)

    def test_lambda_lr(self) -> None:
        pair = self.pair()
        for optimizer, params in pair:
            scheduler = LambdaLR(optimizer, lambda epoch: 0.7**epoch)
            for step in range(STEPS):
                train(optimizer, params, step, step + 1)
                scheduler.step()
        assert pair[0][0].param_groups[0]["lr"] == pair[1][0].param_groups[0]["lr"]
        self.assert_together(pair, STEPS)

    @pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
    def test_one_cycle_with_momentum(self, cls: type[torch.optim.Optimizer]) -> None:
        pair = self.pair(cls, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
        for optimizer, params in pair:
            scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1, cycle_momentum=True)
            for step in range(STEPS):
                train(optimizer, params, step, step + 1)
                scheduler.step()
        # Bias corrections with a beta of the moment magnify roundings, alike for both.
        self.assert_together(pair, 2 * STEPS)

    def test_closure(self) -> None:
        params = make_params()
        optimizer = FusedSGD(params, lr=0.5)
        calls: list[bool] = []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = torch.stack([p.sum() for p in params]).sum()
            loss.backward()
            return loss

        starts = clone(params)
        loss = optimizer.step(closure)
        assert calls == [True]
        assert isinstance(loss, Tensor)
        for param, start in zip(params, starts, strict=True):
            assert torch.equal(param, start - 0.5)
        assert optimizer.step() is None

    @pytest.mark.parametrize("cls", ALL_CLASSES)
    def test_step_hooks_fire_once(self, cls: type[FusedOptimizer]) -> None:
        params = make_params()
        optimizer = cls(params)
        seen: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        train(optimizer, params, 0, 2)
        assert seen == ["before", "after"] * 2

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad(self, set_to_none: bool) -> None:
        pair = self.pair(weight_decay=0.1)
        for optimizer, params in pair:
            train(optimizer, params, 0, 2)
            set_grads(params, 2)
            optimizer.zero_grad(set_to_none)
            optimizer.step()
            assert all(p.grad is None or not p.grad.any() for p in params)
        self.assert_together(pair, 3)

    @pytest.mark.parametrize("cls", TORCH_CLASSES)
    def test_parameters_whose_data_was_replaced(self, cls: type[torch.optim.Optimizer]) -> None:
        pair = self.pair(cls)
        for optimizer, params in pair:
            train(optimizer, params, 0, 2)
            for number, param in enumerate(params):
                param.data = values(*param.shape, seed=50 + number)
            params[3].data = params[3].data.t().contiguous().t()  # other strides
            train(optimizer, params, 2, 5)
        self.assert_together(pair, 5)

    @pytest.mark.parametrize("weights", ["float32", "remainder", "none"])
    def test_sixteen_bit_parameters_whose_data_was_replaced(self, weights: str) -> None:
        """The new value counts, not the master of the old one."""
        params = make_params(BF16)
        optimizer = FusedAdamW(params, lr=1e-3, master_weights=weights)
        train(optimizer, params, 0, 2)
        for param in params:
            param.data = torch.full_like(param.data, 5.0)
        train(optimizer, params, 2, 3)
        assert all(bool(((p - 5.0).abs() < 0.1).all()) for p in params)

    @pytest.mark.parametrize(
        "weights",
        [
            "float32",
            "remainder",
            "none",
        ],
    )
    def test_sixteen_bit_parameters_written_in_place(self, weights: str) -> None:
        """As by a mask, by clamping, or by loading the model's weights."""
        params = make_params(BF16)
        optimizer = FusedAdamW(params, lr=1e-3, master_weights=weights)
        train(optimizer, params, 0, 2)
        with torch.no_grad():
            for param in params:
                param.zero_()
        train(optimizer, params, 2, 3)
        assert all(bool((p.abs() < 0.1).all()) for p in params)

    def test_data_replaced_by_zeros_beside_remainders(self) -> None:
        param = nn.Parameter(values(1000, seed=1, dtype=BF16))
        optimizer = FusedAdamW([param], lr=1e-3, master_weights="remainder")
        train(optimizer, [param], 0, 2)
        param.data = torch.zeros_like(param.data)
        train(optimizer, [param], 2, 3)
        assert bool(param.isfinite().all())

    def test_parameters_replaced_in_their_group(self) -> None:
        pair = self.pair()
        for optimizer, params in pair:
            train(optimizer, params, 0, 2)
            new = nn.Parameter(values(*params[3].shape, seed=77))
            optimizer.state[new] = optimizer.state.pop(params[3])
            optimizer.param_groups[0]["params"][3] = params[3] = new
            train(optimizer, params, 2, 4)
        self.assert_together(pair, 4)

    @pytest.mark.parametrize("edit", ["moved", "dropped group", "emptied group"])
    def test_edited_groups(self, edit: str) -> None:
        pair = self.pair()
        for optimizer, params in pair:
            groups = optimizer.param_groups
            groups[0]["params"] = params[:3]
            optimizer.add_param_group({"params": params[3:5], "lr": 0.05})
            optimizer.add_param_group({"params": params[5:], "lr": 0.2})
            train(optimizer, params, 0, 2)
            if edit == "moved":
                groups[0]["params"].append(groups[1]["params"].pop(0))
            elif edit == "emptied group":
                groups[1]["params"].clear()
            else:
                del groups[1]
            train(optimizer, params, 2, 4)
        self.assert_together(pair, 4)

    def test_state_on_the_device_that_parameters_have_left_is_let_go(self) -> None:
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
        optimizer = FusedAdamW(params)
        train(optimizer, params, 0, 1)
        state = weakref.ref(optimizer.state[params[0]]["exp_avg"])
        for param in params:  # another dtype instead of another device, which the CPU has not
            param.grad = None
            param.data = param.data.to(BF16)
        train(optimizer, params, 1, 2)
        assert state() is None

    def test_state_that_was_cleared_or_replaced(self) -> None:
        pair = self.pair()
        for optimizer, params in pair:
            train(optimizer, params, 0, 2)
            optimizer.state[params[3]] = {}
            optimizer.state[params[4]].clear()
            optimizer.state[params[6]]["exp_avg"] = torch.ones_like(params[6])
            train(optimizer, params, 2, 4)
        self.assert_together(pair, 4)

    def test_state_written_in_place(self) -> None:
        pair = self.pair()
        for optimizer, params in pair:
            train(optimizer, params, 0, 2)
            optimizer.state[params[3]]["exp_avg"].zero_()
            optimizer.state[params[3]]["step"].zero_()
            train(optimizer, params, 2, 4)
        self.assert_together(pair, 4)

    def test_a_parameter_that_gets_its_first_gradient_late(self) -> None:
        pair = self.pair()
        for optimizer, params in pair:
            for step in range(STEPS):
                set_grads(params, step)
                params[-1].grad = values(*params[-1].shape, seed=step) if step > 2 else None
                optimizer.step()
                assert (params[-1] in optimizer.state) == (step > 2)
        self.assert_together(pair, STEPS)

    @pytest.mark.parametrize(("dtype", "weights"), TIERS, ids=TIER_IDS)
    @pytest.mark.parametrize("cls", ALL_CLASSES)
    def test_a_late_parameter_does_not_disturb_the_others(
        self, cls: type[FusedOptimizer], dtype: torch.dtype, weights: str
    ) -> None:
        params, others = make_params(dtype), make_params(dtype)
        for each, late in ((params, True), (others, False)):
            optimizer = cls(each, **tier_options(cls, weights, F32))
            for step in range(STEPS):
                set_grads(each, step)
                if late and step < 3:
                    each[-1].grad = None
                optimizer.step()
        assert_equal(params[:-1], others[:-1])

    def test_options_turned_on_and_off(self) -> None:
        pair = self.pair(torch.optim.SGD)
        for optimizer, params in pair:
            for step in range(3 * 2):
                optimizer.param_groups[0]["momentum"] = 0.9 if step in (2, 3) else 0.0
                train(optimizer, params, step, step + 1)
        self.assert_together(pair, 6)

    def test_load_state_dict_pre_hooks(self) -> None:
        pair = self.pair()
        for optimizer, params in pair:
            train(optimizer, params, 0, 2)

            def halve(_: Any, given: dict[str, Any]) -> dict[str, Any]:
                state = {key: {**e, "exp_avg": e["exp_avg"] / 2} for key, e in given["state"].items()}
                return {**given, "state": state}

            optimizer.register_load_state_dict_pre_hook(halve)
            optimizer.load_state_dict(optimizer.state_dict())
            train(optimizer, params, 2, 4)
        self.assert_together(pair, 4)

    def test_gradients_of_changing_dtype(self) -> None:
        params, others = [nn.Parameter(torch.zeros(9))], [nn.Parameter(torch.zeros(9))]
        ours, theirs = FusedAdamW(params, lr=0.1), torch.optim.AdamW(others, lr=0.1)
        if not hasattr(params[0], "grad_dtype"):
            pytest.xfail("this torch has no grad_dtype")
        params[0].grad_dtype = None
        for step in range(4):
            grad = values(9, seed=step, dtype=BF16)
            params[0].grad = grad if step % 2 else grad.float()
            others[0].grad = grad.float()
            ours.step()
            theirs.step()
            params[0].grad = None
        assert_close(params[0], others[0], 4 * ULPS_A_STEP)

    def test_gradients_that_are_negated_lazily(self) -> None:
        param = nn.Parameter(torch.zeros(5))
        param.grad = torch._neg_view(torch.ones(5))
        FusedSGD([param], lr=1.0).step()
        assert torch.equal(param.detach(), torch.ones(5))

    @pytest.mark.parametrize("default", [torch.float64, BF16], ids=str)
    @pytest.mark.parametrize("state", [F32, INT8], ids=str)
    def test_other_default_dtypes(self, default: torch.dtype, state: torch.dtype) -> None:
        params, others = make_params(), make_params()
        train(FusedAdamW(params, state_dtype=state), params, 0, 3)
        try:
            torch.set_default_dtype(default)
            optimizer = FusedAdamW(others, state_dtype=state)
            for step in range(3):
                torch.set_default_dtype(F32)
                set_grads(others, step)
                torch.set_default_dtype(default)
                optimizer.step()
        finally:
            torch.set_default_dtype(F32)
        assert_equal(others, params)


class TestRefusals:
    @pytest.mark.parametrize("cls", TORCH_CLASSES.values())
    def test_differentiable(self, cls: type[FusedOptimizer]) -> None:
        with pytest.raises(NotSupportedError, match="differentiated through"):
            cls(make_params(), differentiable=True)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
    @pytest.mark.parametrize("cls", ALL_CLASSES)
    def test_parameters_of_other_dtypes(self, cls: type[FusedOptimizer], dtype: torch.dtype) -> None:
        with pytest.raises(NotSupportedError, match=str(dtype)):
            cls([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=dtype))])

    @pytest.mark.parametrize(
        "group",
        [
            {"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]},
            {"params": [nn.Parameter(torch.zeros(3))], "differentiable": True},
        ],
        ids=["dtype", "differentiable"],
    )
    def test_groups_added_later(self, group: dict[str, Any]) -> None:
        optimizer = FusedAdamW(make_params())
        with pytest.raises(NotSupportedError):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1

    @pytest.mark.parametrize("cls", ALL_CLASSES)
    def test_sparse_gradients_before_anything_is_changed(self, cls: type[FusedOptimizer]) -> None:
        embedding = nn.Embedding(10, 4, sparse=True)
        params = [nn.Parameter(torch.ones(3)), embedding.weight]
        optimizer = cls(params)
        embedding(torch.tensor([1, 2])).sum().backward()
        params[0].grad = torch.ones(3)
        before = clone(params)
        with pytest.raises(NotSupportedError, match="parameter 1 has a sparse gradient"):
            optimizer.step()
        assert_equal(params, before)
        assert all(float(entry.get("step", 0)) == 0 for entry in optimizer.state.values())

    def test_sparse_gradients_beside_parameters_of_another_dtype(self) -> None:
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=BF16))]
        optimizer = FusedAdamW(params)
        params[0].grad, params[1].grad = torch.ones(3), torch.ones(3, dtype=BF16).to_sparse()
        before = clone(params)
        with pytest.raises(NotSupportedError, match="sparse"):
            optimizer.step()
        assert_equal(params, before)

    def test_dtensors_before_anything_is_changed(self, run_on_ranks: RunOnRanks) -> None:
        (message,) = run_on_ranks(1, step_dtensor)
        assert "parameter 1 is a DTensor" in message

    @pytest.mark.parametrize("gaps", ["columns", "expanded"])
    def test_parameters_with_gaps_in_memory_step_as_under_torch_or_are_refused(self, gaps: str) -> None:
        def make() -> tuple[Tensor, nn.Parameter]:
            memory = torch.arange(32.0).view(4, 8)
            return memory, nn.Parameter(memory[:, :3] if gaps == "columns" else memory[:, 1:2].expand(4, 6))

        memory, param = make()
        param.grad = torch.ones_like(param)
        before = memory.clone()
        try:
            FusedSGD([param], lr=0.5).step()
        except (ConfigError, NotSupportedError, RuntimeError):
            assert torch.equal(memory, before)
            return
        expected = before.clone()
        expected[:, :3] -= 0.5
        assert gaps == "columns" and torch.equal(memory, expected)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize(
        "options", [{"state_dtype": torch.float16}, {"state_dtype": torch.float64}, {"state_dtype": "int8"}], ids=str
    )
    def test_unknown_state_dtypes(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="state_dtype"):
            FusedAdamW(make_params(dtype), **options)

    @pytest.mark.parametrize(
        "dtype",
        [F32, BF16, F16],
        ids=str,
    )
    @pytest.mark.parametrize("weights", ["float16", "", None])
    def test_unknown_master_weights(self, dtype: torch.dtype, weights: Any) -> None:
        with pytest.raises(ConfigError, match="master_weights"):
            FusedAdamW(make_params(dtype), master_weights=weights)

    @pytest.mark.parametrize("weights", ["remainder", "none"])
    def test_master_weights_that_float16_does_not_have(self, weights: str) -> None:
        with pytest.raises(ConfigError, match=weights):
            FusedAdamW(make_params(F16), master_weights=weights)

    def test_parameters_that_share_memory(self) -> None:
        memory = torch.ones(8)
        params = [nn.Parameter(memory[:5]), nn.Parameter(memory[4:])]
        with pytest.raises(ConfigError, match="overlap"):
            train(FusedSGD(params), params, 0, 1)
        assert torch.equal(memory, torch.ones(8))
