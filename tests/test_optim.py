"""The fused kernels as ordinary optimizers: torch's own where torch has them, the papers' where it has not."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInput,
    optim_db,
)
from training import Mlp
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import ConfigError, NotSupportedError
from zeroopt.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLAMB, FusedLion, FusedOptimizer, FusedSGD

Params = list[nn.Parameter]
Make = Callable[[Any], torch.optim.Optimizer]

TORCH_CLASSES: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {
    torch.optim.AdamW: FusedAdamW,
    torch.optim.Adam: FusedAdam,
    torch.optim.SGD: FusedSGD,
    torch.optim.Adagrad: FusedAdagrad,
}
ALL_CLASSES: list[type[FusedOptimizer]] = [*TORCH_CLASSES.values(), FusedLion, FusedLAMB]
# Options with which a class has all the state that it can have, and steps that 16 bits can show.
FULL: dict[type, dict[str, Any]] = {
    FusedAdamW: {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1},
    FusedAdam: {"lr": 1e-2, "weight_decay": 0.1},
    FusedSGD: {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    FusedAdagrad: {"lr": 1e-2, "initial_accumulator_value": 0.125},
    FusedLion: {"lr": 1e-3, "weight_decay": 0.1},
    FusedLAMB: {"lr": 1e-2},
}
STEPS = 6
# In units of the last place of a tensor's largest element. torch multiplies and adds in another order here and there.
ULPS_A_STEP = 4

F32, BF16, F16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
TIERS = [
    (F32, "float32"),
    (BF16, "float32"),
    (F16, "float32"),
    (BF16, "remainder"),
    (BF16, "none"),
]
STATE_DTYPES = [F32, BF16, INT8]
TIER_IDS = [f"{str(dtype)[6:]}-{weights}" for dtype, weights in TIERS]


def values(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_params(dtype: torch.dtype = F32) -> Params:
    """Every kind of shape, and of memory without gaps."""
    tensors = [
        values(seed=1),
        values(0, seed=2),
        values(1, seed=3),
        values(33, 7, seed=4),
        values(4, 3, 5, 2, seed=5).contiguous(memory_format=torch.channels_last),
        values(9, 6, seed=6).t(),
        values(517, seed=7),
    ]
    return [nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def set_grads(params: Params, step: int, scale: float = 1.0) -> None:
    """The gradients of a step: some missing, some with other strides than their parameter."""
    for number, param in enumerate(params):
        grad = (values(*param.shape, seed=1000 * step + number) * scale).to(param.dtype)
        if (number + step) % 3 == 0 and grad.dim() == 2:
            grad = grad.t().contiguous().t()
        param.grad = None if (number + step) % 5 == 4 else grad


def two_groups(params: Params, lr: float | Tensor | None = None) -> list[dict[str, Any]]:
    second = {} if lr is None else {"lr": lr / 2}
    return [{"params": params[::2]}, {"params": params[1::2], **second}]


def train(optimizer: torch.optim.Optimizer, params: Params, first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()
    for param in params:
        param.grad = None


def clone(params: Params) -> Params:
    """With their memory layout."""
    return [nn.Parameter(param.detach().clone()) for param in params]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Bit for bit, of nested containers too."""
    if isinstance(theirs, (dict, list, tuple)):
        assert len(ours) == len(theirs)
        keys = theirs.keys() if isinstance(theirs, dict) else range(len(theirs))
        for key in keys:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, Tensor):
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.detach(), theirs.detach())
    else:
        assert ours == theirs


def assert_close(ours: Tensor, theirs: Tensor, ulps: float) -> None:
    assert ours.shape == theirs.shape
    if torch.equal(ours.detach(), theirs.detach()):
        return
    largest = theirs.detach().abs().max()
    ulp = torch.nextafter(largest, largest * 2) - largest
    difference = float((ours.detach() - theirs.detach()).abs().max() / ulp)
    assert difference <= ulps, f"differs by {difference:.1f} ulp, {ulps} allowed"


def assert_follows(
    ours: torch.optim.Optimizer, our_params: Params, theirs: torch.optim.Optimizer, their_params: Params, ulps: float
) -> None:
    """Parameters, and state by name. Empty parameters have no state here."""
    for our, their in zip(our_params, their_params, strict=True):
        assert_close(our, their, ulps)
        if not their.numel():
            continue
        assert ours.state[our].keys() == theirs.state[their].keys()
        for name, value in theirs.state[their].items():
            assert_close(ours.state[our][name], value, ulps)


def database() -> Iterator[Any]:
    """The inputs of torch's optimizer database; those for CUDA are the ones for the CPU and some with capturable."""
    for entry in optim_db:
        if entry.optim_cls in TORCH_CLASSES:
            for given in entry.optim_inputs_func(device="cuda"):
                yield pytest.param(entry.optim_cls, given, id=f"{entry.optim_cls.__name__}-{given.desc}")


def database_errors() -> Iterator[Any]:
    for entry in optim_db:
        if entry.optim_cls in TORCH_CLASSES:
            for given in entry.optim_error_inputs_func(device="cpu", dtype=F32):
                name = given.optimizer_error_input.desc
                yield pytest.param(entry.optim_cls, given, id=f"{entry.optim_cls.__name__}-{name}")


class TestLikeTorch:
    @pytest.mark.parametrize(("cls", "given"), list(database()))
    def test_follows_torch_for_every_input_of_its_database(
        self, cls: type[torch.optim.Optimizer], given: OptimizerInput
    ) -> None:
        lr = given.kwargs.get("lr")
        params = make_params()
        ours = TORCH_CLASSES[cls](two_groups(params, lr), **given.kwargs)
        # torch itself captures on CUDA only, and wants there what is a tensor here.
        plain = {name: to_floats(value) for name, value in given.kwargs.items() if name != "capturable"}
        references = make_params()
        theirs = cls(two_groups(references, plain.get("lr")), **plain, foreach=False)
        for step in range(STEPS):
            for each in (params, references):
                set_grads(each, step)
            ours.step()
            theirs.step()
            assert_follows(ours, params, theirs, references, ULPS_A_STEP * (step + 1))

    @pytest.mark.parametrize(("cls", "given"), list(database_errors()))
    def test_refuses_what_torch_refuses(self, cls: type[torch.optim.Optimizer], given: ErrorOptimizerInput) -> None:
        case = given.optimizer_error_input
        params = case.params if case.params is not None else make_params()
        if given.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
            is_warning = issubclass(given.error_type, Warning)
            with (pytest.warns if is_warning else pytest.raises)(given.error_type, match=given.error_regex):
                TORCH_CLASSES[cls](params, **case.kwargs)
        else:
            optimizer = TORCH_CLASSES[cls](params, **case.kwargs)
            with pytest.raises(given.error_type, match=given.error_regex):
                optimizer.step()

    @pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
    @pytest.mark.parametrize("cls", TORCH_CLASSES)
    def test_torchs_choices_of_implementation_change_nothing(
        self, cls: type[torch.optim.Optimizer], options: dict[str, bool]
    ) -> None:
        params, others = make_params(), make_params()
        train(TORCH_CLASSES[cls](params), params, 0, 3)
        train(TORCH_CLASSES[cls](others, **options), others, 0, 3)
        assert_equal(others, params)

    @pytest.mark.parametrize("cls", TORCH_CLASSES)
    def test_has_torchs_arguments_and_defaults(self, cls: type[torch.optim.Optimizer]) -> None:
        ours, theirs = TORCH_CLASSES[cls](make_params()), cls(make_params())
        assert isinstance(ours, cls)
        assert ours.defaults == theirs.defaults
        assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
        # By position too.
        positional = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        arguments = [theirs.defaults[p.name] for p in positional[1:]]
        assert TORCH_CLASSES[cls](make_params(), *arguments).defaults == theirs.defaults

    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize("cls", TORCH_CLASSES)
    def test_state_dicts_go_either_way(self, cls: type[torch.optim.Optimizer], amsgrad: bool) -> None:
        options = {name: value for name, value in FULL[TORCH_CLASSES[cls]].items() if name != "amsgrad"}
        if amsgrad and "amsgrad" in inspect.signature(cls).parameters:
            options["amsgrad"] = True
        params, references = make_params(), make_params()
        ours = TORCH_CLASSES[cls](two_groups(params), **options)
        theirs = cls(two_groups(references), **options)
        train(ours, params, 0, 3)
        train(theirs, references, 0, 3)
        given, expected = ours.state_dict(), theirs.state_dict()
        assert given["param_groups"] == expected["param_groups"]
        not_empty = [key for key, entry in expected["state"].items() if any(v.numel() for v in entry.values())]
        assert all(given["state"][key].keys() == expected["state"][key].keys() for key in given["state"])
        assert set(given["state"]) >= {key for key in not_empty if key != position_of_empty(theirs)}

        there = cls(two_groups(clone(params)), **options)
        there.load_state_dict(saved_and_loaded(given))
        continue_both(ours, params, there)
        back = TORCH_CLASSES[cls](two_groups(clone(references)), **options)
        back.load_state_dict(saved_and_loaded(expected))
        continue_both(theirs, references, back)

    def test_older_state_dicts_with_plain_step_counts_load(self) -> None:
        params, others = make_params(), make_params()
        ours = FusedAdamW(params)
        train(ours, params, 0, 3)
        old = copy.deepcopy(ours.state_dict())
        for entry in old["state"].values():
            entry["step"] = int(entry["step"])
        copied = FusedAdamW(others)
        with torch.no_grad():
            for other, param in zip(others, params, strict=True):
                other.copy_(param)
        copied.load_state_dict(old)
        train(ours, params, 3, 5)
        train(copied, others, 3, 5)
        assert_equal(others, params)

    def test_state_dicts_for_distributed_checkpoints(self) -> None:
        """torch.distributed.checkpoint steps a fresh optimizer with a learning rate of 0 to make its state."""
        from torch.distributed.checkpoint import state_dict as dcp

        torch.manual_seed(0)
        net = Mlp()
        optimizer = FusedAdamW(net.parameters(), lr=1e-2)
        train(optimizer, list(net.parameters()), 0, 3)
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(net, optimizer))
        other = copy.deepcopy(net)
        loaded = FusedAdamW(other.parameters(), lr=1e-2)
        dcp.set_optimizer_state_dict(other, loaded, saved)
        for each, model in ((optimizer, net), (loaded, other)):
            train(each, list(model.parameters()), 3, 6)
        assert_equal(list(other.parameters()), list(net.parameters()))


def to_floats(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(to_floats, value))
    return float(value) if isinstance(value, Tensor) else value


def position_of_empty(optimizer: torch.optim.Optimizer) -> int:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return next(i for i, param in enumerate(params) if not param.numel())


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def params_of(optimizer: torch.optim.Optimizer) -> Params:
    """In the order of `make_params`, of an optimizer over `two_groups` of them."""
    first, second = (group["params"] for group in optimizer.param_groups)
    result: Params = []
    for i in range(len(first) + len(second)):
        result.append((second if i % 2 else first)[i // 2])
    return result


def continue_both(optimizer: torch.optim.Optimizer, params: Params, other: torch.optim.Optimizer) -> None:
    """Both go on from step 3, and stay together."""
    train(optimizer, params, 3, 3 + STEPS)
    train(other, params_of(other), 3, 3 + STEPS)
    for mine, theirs in zip(params_of(other), params, strict=True):
        assert_close(mine, theirs, ULPS_A_STEP * STEPS)


def lion(param: Tensor, grads: list[Tensor], *, lr: float, betas: Any, weight_decay: float, maximize: bool) -> Tensor:
    """Chen et al. 2023, algorithm 2."""
    p, m = param.double(), torch.zeros_like(param, dtype=torch.float64)
    for grad in grads:
        g = -grad.double() if maximize else grad.double()
        direction = betas[0] * m + (1 - betas[0]) * g
        p = p - lr * (direction.sign() + weight_decay * p)
        m = betas[1] * m + (1 - betas[1]) * g
    return p


def lamb(
    param: Tensor, grads: list[Tensor], *, lr: float, betas: Any, eps: float, weight_decay: float, maximize: bool
) -> Tensor:
    """You et al. 2020, algorithm 2."""
    p = param.double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step, grad in enumerate(grads, start=1):
        g = -grad.double() if maximize else grad.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        r = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        u = r + weight_decay * p
        ratio = p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1.0
        p = p - lr * ratio * u
    return p


class TestLionAndLamb:
    @pytest.mark.parametrize("maximize", [False, True])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.3])
    @pytest.mark.parametrize(
        ("cls", "reference", "more"), [(FusedLion, lion, {}), (FusedLAMB, lamb, {"eps": 1e-3})], ids=["lion", "lamb"]
    )
    def test_follows_the_paper(
        self,
        cls: type[FusedOptimizer],
        reference: Callable[..., Tensor],
        more: dict[str, float],
        weight_decay: float,
        maximize: bool,
    ) -> None:
        options = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": weight_decay, "maximize": maximize, **more}
        params, starts = make_params(), make_params()
        optimizer = cls(params, **options)
        seen: list[list[Tensor]] = [[] for _ in params]
        for step in range(STEPS):
            set_grads(params, step)
            for grads, param in zip(seen, params, strict=True):
                grads.extend([] if param.grad is None else [param.grad.clone()])
            optimizer.step()
        for param, start, grads in zip(params, starts, seen, strict=True):
            assert_close(param, reference(start.detach(), grads, **options).float(), ULPS_A_STEP * STEPS)

    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_lamb_does_not_scale_parameters_or_updates_of_norm_0(self, weight_decay: float) -> None:
        zeros, still = nn.Parameter(torch.zeros(5)), nn.Parameter(values(5, seed=1))
        options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay, "maximize": False}
        optimizer = FusedLAMB([zeros, still], **options)
        zeros.grad, still.grad = values(5, seed=2), torch.zeros(5)
        start = still.detach().clone()
        optimizer.step()
        assert_close(zeros, -0.1 * values(5, seed=2).sign(), 64)  # the size of one element's step is lr
        assert_close(still, lamb(start, [torch.zeros(5)], **options).float(), ULPS_A_STEP)
        assert bool(zeros.isfinite().all() and still.isfinite().all())

    def test_lion_leaves_elements_of_no_direction(self) -> None:
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.tensor([0.0, 1.0, -1.0])
        FusedLion([param], lr=0.25).step()
        assert torch.equal(param.detach(), torch.tensor([1.0, 0.75, 1.25]))

    @pytest.mark.parametrize("cls", [FusedLion, FusedLAMB])
    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"lr": -1.0}, "lr"),
            ({"lr": float("nan")}, "lr"),
            ({"weight_decay": -0.1}, "weight_decay"),
            ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
            ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ],
    )
    def test_refuses_what_cannot_be_right(self, cls: type[FusedOptimizer], options: dict[str, Any], name: str) -> None:
        with pytest.raises(ConfigError, match=name):
            cls(make_params(), **options)

    def test_lamb_refuses_a_negative_eps(self) -> None:
        with pytest.raises(ConfigError, match="eps"):
            FusedLAMB(make_params(), eps=-1e-8)


def state_names(cls: type[FusedOptimizer]) -> dict[str, bool]:
    """The moments of FULL[cls], and whether they can be negative."""
    rule = cls.fused_rule
    signed = dict(zip(rule.state_names, rule.signed, strict=True))
    return {name: signed[name] for name in rule.names_in_use(FULL[cls] | {"amsgrad": "amsgrad" in FULL[cls]})}


def expected_dtypes(cls: type[FusedOptimizer], dtype: torch.dtype, weights: str, state: torch.dtype) -> dict[str, Any]:
    """What the documentation promises for a parameter's state."""
    is_stochastic = weights == "none" or state is not F32
    result: dict[str, Any] = {"step": F32} if cls.fused_rule.has_step or is_stochastic else {}
    if dtype is not F32 and weights != "none":
        result |= {"master_param": F32} if weights == "float32" else {"remainder": torch.int16}
    for name, signed in state_names(cls).items():
        result[name] = torch.uint8 if state is INT8 and not signed else state
        if state is INT8:
            result[name + "_scale"] = F32
    return result


def tier_options(cls: type[FusedOptimizer], weights: str, state: torch.dtype) -> dict[str, Any]:
    return {**FULL[cls], "master_weights": weights, "state_dtype": state, "seed": 3}


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

    @pytest.mark.parametrize("state", [F32, BF16], ids=str)
    def test_int8_codes_are_not_taken_for_numbers(self, state: torch.dtype) -> None:
        """They are decoded, or the load is refused."""
        params = make_params()
        optimizer = FusedAdamW(params, state_dtype=INT8)
        train(optimizer, params, 0, 3)
        other = FusedAdamW(params, state_dtype=state)
        try:
            other.load_state_dict(optimizer.state_dict())
            train(other, params, 3, 4)
        except (ConfigError, NotSupportedError):
            return
        stepped = [p for p in params if p.numel() and p.grad is not None]
        assert all(float(other.state[p]["exp_avg"].abs().max()) < 10 for p in stepped)


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


SCALED: dict[str, tuple[type[FusedOptimizer], dict[str, Any]]] = {
    "adamw": (FusedAdamW, {"lr": 1e-2}),
    "sgd": (FusedSGD, {"lr": 1e-1, "momentum": 0.9}),
    "lamb": (FusedLAMB, {"lr": 1e-2}),
}


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
            if type(optimizer) is torch.optim.Adagrad and more[0] not in optimizer.state:
                pytest.skip("this torch's Adagrad makes no state for groups that are added later")
            train(optimizer, params, 3, 7)
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

    def test_state_that_was_cleared_or_replaced(self) -> None:
        pair = self.pair()
        for optimizer, params in pair:
            train(optimizer, params, 0, 2)
            optimizer.state[params[3]] = {}
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


WRAPPED: dict[str, Make] = {
    "adamw": lambda p: FusedAdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: FusedSGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: FusedAdagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "lion": lambda p: FusedLion(p, lr=1e-3, weight_decay=0.1),
}


def mean_loss(net: nn.Module, step: int, ranks: range) -> Tensor:
    losses = []
    for rank in ranks:
        inputs = Mlp.inputs(torch.Generator().manual_seed(10 * step + rank))
        losses.append(net(inputs).square().mean())
    return torch.stack(losses).mean()


def train_wrapped(name: str, world_size: int, stage: int) -> list[Tensor]:
    """On the mean over ranks: by each rank on its part, or for stage -1 alone on all of it."""
    torch.manual_seed(0)
    net = Mlp()
    model: nn.Module = net
    optimizer = WRAPPED[name](net.parameters())
    ranks = range(world_size)
    if stage >= 0:
        model, optimizer = zeroopt.wrap(net, optimizer, stage=stage)
        ranks = range(torch.distributed.get_rank(), torch.distributed.get_rank() + 1)
    for step in range(4):
        mean_loss(model, step, ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in net.parameters()]


def wrap_lamb() -> str:
    net = Mlp()
    try:
        zeroopt.wrap(net, FusedLAMB(net.parameters()))
    except NotSupportedError as error:
        return str(error)
    return "accepted"


class TestWrapped:
    @pytest.mark.parametrize("stage", [0, 1, 2])
    @pytest.mark.parametrize("name", WRAPPED)
    def test_trains_as_alone_on_the_mean_gradient(self, run_on_ranks: RunOnRanks, name: str, stage: int) -> None:
        expected = train_wrapped(name, 2, -1)
        for params in run_on_ranks(2, train_wrapped, name, 2, stage):
            for param, want in zip(params, expected, strict=True):
                torch.testing.assert_close(param, want, rtol=1e-4, atol=1e-5)

    def test_lamb_is_refused(self, run_on_ranks: RunOnRanks) -> None:
        for message in run_on_ranks(2, wrap_lamb):
            assert "not element-wise" in message
