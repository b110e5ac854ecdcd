"""The fused kernels as ordinary optimizers: torch's own where torch has them, the papers' where it has not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from optim_cases import (
    F32,
    FULL,
    STEPS,
    TORCH_CLASSES,
    ULPS_A_STEP,
    Make,
    assert_close,
    assert_equal,
    assert_follows,
    clone,
    continue_both,
    make_params,
    saved_and_loaded,
    set_grads,
    train,
    two_groups,
    values,
)
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInput,
    optim_db,
)
from training import Mlp
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import ConfigError
from zeroopt.optim import FusedAdagrad, FusedAdamW, FusedLAMB, FusedLion, FusedOptimizer, FusedRMSprop, FusedSGD


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

    @pytest.mark.parametrize(
        ("cls", "options"),
        [
            (cls, {option: chosen})
            for cls, option, chosen in product(TORCH_CLASSES, ("foreach", "fused"), (True, False))
            if option in inspect.signature(cls).parameters
        ],
    )
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


WRAPPED: dict[str, Make] = {
    "adamw": lambda p: FusedAdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: FusedSGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: FusedAdagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda p: FusedRMSprop(p, lr=1e-2, momentum=0.5, centered=True, eps=1e-3),
    "lion": lambda p: FusedLion(p, lr=1e-3, weight_decay=0.1),
    "lamb": lambda p: FusedLAMB(p, lr=1e-2, weight_decay=0.1),
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


class TestWrapped:
    @pytest.mark.parametrize("stage", [0, 1, 2])
    @pytest.mark.parametrize("name", WRAPPED)
    def test_trains_as_alone_on_the_mean_gradient(self, run_on_ranks: RunOnRanks, name: str, stage: int) -> None:
        expected = train_wrapped(name, 2, -1)
        for params in run_on_ranks(2, train_wrapped, name, 2, stage):
            for param, want in zip(params, expected, strict=True):
                torch.testing.assert_close(param, want, rtol=1e-4, atol=1e-5)
