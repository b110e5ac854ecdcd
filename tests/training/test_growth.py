"""Parameters that an optimizer gets, or that are frozen and unfrozen, after wrapping: as on a DistributedDataParallel model
that is wrapped anew."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from mmap import PAGESIZE
from typing import Any

import pytest
import torch
import torch.distributed as dist
from short_timeouts import lose_patience
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import batch, build, loss_of, prepare_all, snapshot
from transports import hosts, open_memory, resident_shared_pages
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import _C

STAGES = (0, 1, 2)
Options = dict[str, Any] | None


class Run:
    """A model in training, on which things happen between one call and the next. With options of None it is under DDP.

    Attributes:
        optimizer: what loops use; `inner` is what was wrapped.
    """

    def __init__(
        self,
        options: Options,
        frozen: str = "",
        left_out: str = "",
        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        name: str = "mlp",
        **hyper: Any,
    ) -> None:
        self.options, self.name = options, name
        self.net = build(name)
        self.freeze(frozen)
        self.inner = make([p for n, p in self.net.named_parameters() if not left_out or left_out not in n], **hyper)
        self.model: nn.Module = self.net
        self.optimizer = self.inner
        if options is None:
            self.wrap_in_ddp()
        else:
            self.model, self.optimizer = zeroopt.wrap(self.net, self.inner, **options)

    def wrap_in_ddp(self) -> None:
        """DDP looks at parameters when it is built."""
        if self.options is None:
            self.model = nn.Identity()  # the one before takes its hooks along
            self.model = DistributedDataParallel(self.net, find_unused_parameters=True)

    def named(self, part: str) -> list[nn.Parameter]:
        """Parameters with that in their names."""
        return [p for n, p in self.net.named_parameters() if part and part in n]

    def freeze(self, part: str, *, frozen: bool = True) -> None:
        for param in self.named(part):
            param.requires_grad_(not frozen)

    def unfreeze(self, part: str) -> None:
        self.freeze(part, frozen=False)
        self.wrap_in_ddp()

    def add(self, part: str, **options: Any) -> None:
        """As a param_group of their own."""
        self.freeze(part, frozen=False)
        self.wrap_in_ddp()
        self.optimizer.add_param_group({"params": self.named(part), **options})

    def backward(self, number: int) -> None:
        loss_of(self.model(batch(self.name, number))).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_close(got: list[Tensor], want: list[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=atol)


MOMENTS = ("first of all", "between backwards", "before the step", "after the step", "later")


def train(options: Options, event: str, moment: str) -> list[Tensor]:
    """Four steps of two backwards each. At one moment of them an event happens."""
    run = Run(options, frozen="layers.2", left_out="layers.2" if "add" in event else "", lr=0.01)
    alone = "no_sync" in event

    def happen(now: str) -> None:
        if now != moment:
            return
        if event.startswith("add, "):
            run.add("layers.2", lr=0.02, weight_decay=0.1)
        elif event == "add to the inner one":
            run.optimizer, outer = run.inner, run.optimizer
            run.add("layers.2.weight")
            run.optimizer.add_param_group({"params": []})
            run.add("layers.2.bias", lr=0.02)
            run.optimizer = outer
        elif event.startswith("unfreeze, "):
            run.unfreeze("layers.2")
        else:
            run.freeze("layers.0")
            run.unfreeze("layers.2.weight")

    for step in range(4):
        happen("first of all" if step == 0 else "after the step" if step == 1 else "later" if step == 3 else "")
        with run.model.no_sync() if alone else nullcontext():  # type: ignore[operator]
            run.backward(2 * step)
        happen("between backwards" if step == 1 else "")
        run.backward(2 * step + 1)
        happen("before the step" if step == 0 else "")
        run.step()
    return snapshot(run.net)


def train_all(variants: list[Options], event: str) -> list[list[list[Tensor]]]:
    return [[train(options, event, moment) for moment in MOMENTS] for options in variants]


GROWTH: list[Options] = [
    {"stage": 0, "fused": False, "bucket_mb": 0.001, "transport": "shm"},
    {"stage": 0, "fused": True, "bucket_mb": 25.0, "transport": "pairwise"},
    {"stage": 1, "fused": "auto", "bucket_mb": 0.001, "transport": "pairwise"},
    {"stage": 1, "fused": False, "bucket_mb": 25.0, "overlap": False},
    {"stage": 2, "fused": False, "bucket_mb": 0.001, "transport": "shm"},
    {"stage": 2, "fused": True, "bucket_mb": 0.001, "share_parameters": True},
]


@pytest.mark.parametrize(
    ("world_size", "event"),
    [
        (2, "add, no_sync"),
        (3, "add to the inner one"),
        (2, "unfreeze, sync"),
        (3, "unfreeze, no_sync"),
        (2, "unfreeze and freeze"),
    ],
)
def test_growth_at_any_moment(run_on_ranks: RunOnRanks, world_size: int, event: str) -> None:
    for ddp, *wrapped in run_on_ranks(world_size, train_all, [None, *GROWTH], event):
        for histories in wrapped:
            for got, want in zip(histories, ddp, strict=True):
                check_close(got, want, 1e-4, 1e-5)  # several backwards are added in another order, and Adam divides


def train_exactly(options: Options) -> list[Tensor]:
    """A backward a step: nothing is added in another order. Parameters are frozen and unfrozen time and again."""
    run = Run(
        options, frozen="layers.4", left_out="scale", make=torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1
    )
    run.backward(0)
    run.step()
    run.unfreeze("layers.4")
    run.net.scale.grad = None  # of the first backward: nobody has cleared it
    run.backward(1)
    run.add("scale", momentum=0.5)  # with a gradient
    run.step()
    run.freeze("layers.0")
    run.wrap_in_ddp()
    run.backward(2)
    run.freeze("layers.2")  # with a gradient, so it is stepped once more
    run.step()
    run.wrap_in_ddp()
    run.backward(3)
    run.step()
    run.unfreeze("layers.0")
    run.backward(4)
    run.step()
    run.freeze("layers")  # all but one
    run.wrap_in_ddp()
    run.backward(5)
    run.step()
    run.unfreeze("layers")
    run.backward(6)
    run.step()
    return snapshot(run.net)


def train_exactly_all(variants: list[Options]) -> list[list[Tensor]]:
    return [train_exactly(options) for options in variants]


@pytest.mark.parametrize("world_size", [1, 2])
def test_freezing_and_unfreezing_time_and_again(run_on_ranks: RunOnRanks, world_size: int) -> None:
    exact: list[Options] = [
        {"stage": stage, "fused": False, "bucket_mb": bucket_mb, "transport": transport}
        for stage in STAGES
        for bucket_mb, transport in ((25.0, "shm"), (0.001, "pairwise"), (0.001, "shm"))
    ]
    fused: list[Options] = [{"stage": stage, "fused": True, "bucket_mb": 0.001} for stage in STAGES]
    for ddp, *wrapped in run_on_ranks(world_size, train_exactly_all, [None, *exact, *fused]):
        for options, values in zip([*exact, *fused], wrapped, strict=True):
            if options in exact:
                assert equal(values, ddp), options
            else:
                check_close(values, ddp)


def train_clipped(options: Options) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Parameters, whole gradients of one that came and of one that was there, and norms, where all gradients are clipped."""
    run = Run(options, frozen="layers.2", make=torch.optim.SGD, lr=0.1)
    watched = [run.net.layers[2].weight, run.net.layers[4].bias]
    grads: list[Tensor] = []
    norms: list[float] = []
    for number in range(4):
        if number == 2:
            run.unfreeze("layers.2")
        run.backward(number)
        if isinstance(run.optimizer, zeroopt.ZeroOptimizer):
            found = [run.optimizer.full_grad(param) for param in watched if param.requires_grad]
            grads += [grad for grad in found if grad is not None]
            if run.optimizer._config.max_grad_norm is None:
                norms.append(nn.utils.clip_grad_norm_(run.model.parameters(), 0.05).item())
                run.step()
            else:
                run.step()
                norms.append(run.optimizer.grad_norm.item())
        else:
            grads += [param.grad.clone() for param in watched if param.grad is not None]
            norms.append(nn.utils.clip_grad_norm_(run.model.parameters(), 0.05).item())
            run.step()
    return snapshot(run.net), grads, norms


def train_clipped_all(variants: list[Options]) -> list[tuple[list[Tensor], list[Tensor], list[float]]]:
    return [train_clipped(options) for options in variants]


def test_clipping(run_on_ranks: RunOnRanks) -> None:
    variants: list[Options] = [
        {"stage": stage, "bucket_mb": 0.001, "max_grad_norm": max_norm} for stage in STAGES for max_norm in (None, 0.05)
    ]
    for (values, grads, norms), *wrapped in run_on_ranks(3, train_clipped_all, [None, *variants]):
        for got, found, mine in wrapped:
            check_close(got, values)
            check_close(found, grads)
            assert mine == pytest.approx(norms, rel=1e-5)


def train_two(options: Options) -> list[Tensor]:
    """Two optimizers of which both grow."""
    net = build("mlp")
    layers: Any = net.layers
    for frozen in (layers[0].bias, layers[2].weight, layers[4]):
        frozen.requires_grad_(False)
    first = torch.optim.SGD([layers[0].weight, layers[0].bias, layers[2].weight], lr=0.1, momentum=0.9)
    second = torch.optim.RMSprop([net.scale, layers[2].bias], lr=0.001)
    model, optimizers = prepare_all(net, [first, second], options)
    for number, thawed in enumerate([None, layers[4], layers[0].bias, layers[2].weight, None]):
        if thawed is not None:
            thawed.requires_grad_(True)
        if options is None:
            model = nn.Identity()  # what was there before takes its hooks along
            model = DistributedDataParallel(net, find_unused_parameters=True)
        if thawed is layers[4]:
            optimizers[1].add_param_group({"params": thawed.parameters(), "lr": 0.002})
        loss_of(model(batch("mlp", number))).backward()
        for optimizer in optimizers:
            if number != 3 or optimizer is optimizers[1]:
                optimizer.step()
            optimizer.zero_grad()
    return snapshot(net)


def train_two_all(variants: list[Options]) -> list[list[Tensor]]:
    with hosts([0, 0, 1, 1]):
        return [train_two(options) for options in variants]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_optimizers_grow(run_on_ranks: RunOnRanks, world_size: int) -> None:
    variants: list[Options] = [
        {"stage": stage, "bucket_mb": 0.001, "fused": False, **more}
        for stage in STAGES
        for more in ({"transport": "pairwise"}, {"transport": "auto"}, {"share_parameters": stage > 0})
    ]
    for ddp, *wrapped in run_on_ranks(world_size, train_two_all, [None, *variants]):
        for options, values in zip(variants, wrapped, strict=True):
            if world_size == 2:
                assert equal(values, ddp), options
            else:
                check_close(values, ddp)


def train_what_has_state(options: Options, optimizer: str) -> list[Tensor]:
    """Parameters that are frozen when the model is wrapped, and of which the optimizer already has state."""
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "made at once": lambda params: torch.optim.Adagrad(params, lr=0.05, initial_accumulator_value=0.1),
        "of a step": lambda params: torch.optim.AdamW(params, lr=0.01),
    }

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = makers[optimizer]([{"params": params[:2]}, {"params": params[2:]}])
        if optimizer == "of a step":
            for param in params:
                param.grad = torch.ones_like(param)
            made.step()
            made.zero_grad()
        return made

    run = Run(options, frozen="layers.0", make=make)
    for number in range(4):
        if number == 2:
            run.optimizer.load_state_dict(run.optimizer.state_dict())
            run.unfreeze("layers.0")
        run.backward(number)
        run.step()
    return snapshot(run.net)


def train_what_has_state_all(variants: list[Options], optimizer: str) -> list[list[Tensor]]:
    return [train_what_has_state(options, optimizer) for options in variants]


@pytest.mark.parametrize("optimizer", ["made at once", "of a step"])
def test_state_of_frozen_parameters_is_kept(run_on_ranks: RunOnRanks, optimizer: str) -> None:
    variants = [{"stage": stage, "fused": fused, "bucket_mb": 0.001} for stage in STAGES for fused in (False, True)]
    for ddp, *wrapped in run_on_ranks(2, train_what_has_state_all, [None, *variants], optimizer):
        for options, values in zip(variants, wrapped, strict=True):
            if options["fused"]:
                check_close(values, ddp)
            else:
                assert equal(values, ddp), options


def add_a_module(options: Options) -> list[Tensor]:
    """A module that the model gets after wrapping, a frozen group that thaws later, and an empty one."""
    run = Run(options, lr=0.01)
    run.backward(0)
    run.step()
    torch.manual_seed(dist.get_rank() if options else 0)  # all ranks start from the parameters of rank 0
    run.net.layers.append(nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9)))
    number = nn.Parameter(torch.tensor([3]), requires_grad=False)  # an integer, which no optimizer can train
    run.net.register_parameter("number", number)
    run.add("layers.5.0")
    run.freeze("layers.5.1")
    run.optimizer.add_param_group({"params": [*run.named("layers.5.1"), number], "lr": 0.1})
    run.optimizer.add_param_group({"params": []})
    for step in range(1, 4):
        if step == 3:
            run.unfreeze("layers.5.1")
        run.backward(step)
        run.step()
    return [p.detach().clone() for p in run.net.parameters()]


def add_a_module_all(variants: list[Options]) -> list[list[Tensor]]:
    return [add_a_module(options) for options in variants]


def test_modules_that_come_later(run_on_ranks: RunOnRanks) -> None:
    variants = [{"stage": stage, "fused": False, "bucket_mb": 0.001} for stage in STAGES]
    for ddp, *wrapped in run_on_ranks(2, add_a_module_all, [None, *variants]):
        assert all(equal(values, ddp) for values in wrapped)


BF16 = {"param_dtype": torch.bfloat16, "bucket_mb": 0.001}
TIERS = [
    {**BF16},
    {**BF16, "master_weights": "remainder"},
    {**BF16, "master_weights": "remainder", "state_dtype": torch.int8},
    {**BF16, "master_weights": "none", "state_dtype": torch.bfloat16},
    {"bucket_mb": 0.001, "state_dtype": torch.int8},
]


def grow_in_tiers(options: dict[str, Any], *, write: bool) -> list[Tensor]:
    """Exact values, state and rounding of what was there before and of what comes. With `write`, the user writes a parameter."""
    run = Run(options, frozen="layers.0.weight", left_out="layers.2", lr=0.01)
    dtype = options.get("param_dtype", torch.float32)
    assert isinstance(run.optimizer, zeroopt.ZeroOptimizer)
    assert run.net.layers[0].weight.dtype is dtype
    run.net.register_buffer("table", torch.ones(3))
    later = run.net.layers[2].weight
    for param in run.named("layers.2"):
        param.data = param.data.to(dtype)  # neither trained so far nor frozen: the user casts them
    for number in range(2):
        loss_of(run.model(batch("mlp", number).to(dtype))).backward()
        run.step()
    run.net.zero_grad()
    values = torch.randn(later.shape, generator=torch.Generator().manual_seed(3))
    later.data = values.clone()
    if write:
        with torch.no_grad():
            run.net.layers[4].weight.fill_(0.375)  # a master has to follow, whatever comes before the step
    masters = ("master_param", "remainder")  # which follow what was written, and are compared by value
    before = {
        p: {k: v.clone() for k, v in entry.items() if k not in masters} for p, entry in run.optimizer.state.items()
    }
    exact = {p: run.optimizer.full_parameter(p) for p in run.named("layers.4.bias")}
    run.optimizer.add_param_group({"params": run.named("layers.2"), "lr": 0.02})
    assert later.dtype is dtype and run.net.table.dtype is torch.float32
    if options.get("master_weights") != "none":
        assert torch.equal(run.optimizer.full_parameter(later), values)
    run.unfreeze("layers.0.weight")
    run.model(batch("mlp", 0).to(dtype))
    run.step()  # without gradients
    for param, entry in before.items():
        assert all(torch.equal(run.optimizer.state[param][k], v) for k, v in entry.items())
    assert all(torch.equal(run.optimizer.full_parameter(p), value) for p, value in exact.items())
    assert not write or (run.optimizer.full_parameter(run.net.layers[4].weight) == 0.375).all()
    for number in range(2, 5):
        loss_of(run.model(batch("mlp", number).to(dtype))).backward()
        run.step()
    assert len(run.optimizer.state) > len(before)
    return [run.optimizer.full_parameter(p) for p in run.net.parameters()]


def grow_in_all_tiers(stage: int) -> list[list[Tensor]]:
    grow_in_tiers({"stage": stage, **TIERS[0]}, write=True)
    return [grow_in_tiers({"stage": stage, **tier}, write=False) for tier in TIERS]


@pytest.mark.parametrize("world_size", [2, 3])
def test_tiers(run_on_ranks: RunOnRanks, world_size: int) -> None:
    for stage in (1, 2):
        for master, remainder, *_ in run_on_ranks(world_size, grow_in_all_tiers, stage):
            assert equal(master, remainder)


def schedule(wrapped: bool, maker: str) -> list[list[float]] | str:
    """Learning rates under a scheduler that was made before a group was added, or what it says."""
    run = Run({} if wrapped else None, left_out="layers.2", make=torch.optim.SGD, lr=0.1, momentum=0.9)
    makers: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
        "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=9),
    }
    scheduler, rates = makers[maker](run.optimizer), []
    try:
        for number in range(4):
            if number == 2:
                run.add("layers.2", lr=0.3)
            run.backward(number)
            run.step()
            scheduler.step()
            rates.append([group["lr"] for group in run.optimizer.param_groups])
    except Exception as error:  # noqa: BLE001  what torch does not support
        return f"{type(error).__name__}: {error}"
    return rates


@pytest.mark.parametrize("maker", ["lambda", "exponential", "one cycle"])
def test_schedulers_do_as_with_plain_optimizers(run_on_ranks: RunOnRanks, maker: str) -> None:
    assert run_on_ranks(2, schedule, True, maker) == run_on_ranks(2, schedule, False, maker)


def save_and_resume(fused: bool, stage: int, bucket_mb: float) -> list[list[Tensor]] | str:
    """Straight on, and from a save with the same groups added; or the error."""
    results = []
    saved: list[dict[str, Any]] = []
    for stop in (4, 2):
        run = Run({"stage": stage, "fused": fused, "bucket_mb": bucket_mb}, left_out="layers.2", lr=0.01)
        run.add("layers.2", lr=0.02)
        for number in range(stop):
            run.backward(number)
            run.step()
        results.append(snapshot(run.net))
        saved = [run.model.state_dict(), run.optimizer.state_dict()]
    run = Run({"stage": stage, "fused": fused, "bucket_mb": bucket_mb}, left_out="layers.2", lr=0.5)
    run.add("layers.2")
    run.model.load_state_dict(saved[0])
    run.optimizer.load_state_dict(saved[1])
    for number in range(2, 4):
        run.backward(number)
        run.step()
    whole = Run({"stage": stage, "fused": fused, "bucket_mb": bucket_mb}, lr=0.01)
    for wrong in (saved[1], {**saved[1], "param_groups": [whole.optimizer.state_dict()["param_groups"][0]]}):
        with pytest.raises(zeroopt.StateError):
            whole.optimizer.load_state_dict(wrong)
    return [results[0], snapshot(run.net)]


def save_and_resume_all() -> list[Any]:
    return [save_and_resume(f, stage, b) for f in (True, False) for stage in STAGES for b in (25.0, 0.001)]


def test_save_and_resume(run_on_ranks: RunOnRanks) -> None:
    for rank in run_on_ranks(2, save_and_resume_all):
        for straight, resumed in rank:
            assert equal(straight, resumed)


class Coupled(torch.optim.Optimizer):
    """Steps each parameter by itself unless an option says otherwise."""

    def __init__(self, params: Any, *, coupled: bool = False) -> None:
        super().__init__(params, {"lr": 0.1, "coupled": coupled})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            norm = sum(param.grad.norm() for param in params) if group["coupled"] else 1.0
            for param in params:
                param.sub_(param.grad / norm, alpha=group["lr"])


def add_wrongly(case: str) -> tuple[str, bool]:
    """The error, and whether training then goes on as if nothing had been tried."""
    odd = dist.get_rank() == 1
    make = Coupled if case == "coupled" else torch.optim.AdamW
    options = {"fused": True} if case == "no kernel" else {}
    runs = [Run(options, left_out="layers.2", make=make) for _ in range(2)]
    run = runs[0]
    for one in runs:
        one.net.register_parameter("extra", nn.Parameter(torch.zeros(3, dtype=torch.complex64), requires_grad=False))
        one.backward(0)
    weight, bias, extra = run.net.layers[2].weight, run.net.layers[2].bias, run.net.extra
    groups: dict[str, Any] = {
        "foreign": {"params": [nn.Parameter(torch.zeros(2))]},
        "in another group": {"params": [bias, run.net.scale]},
        "twice": {"params": [bias, weight, bias]},
        "complex": {"params": [bias, extra]},
        "no kernel": {"params": [bias]},
        "coupled": {"params": [weight], "coupled": True},
        "other optimizer": {"params": [bias, weight]},
        "shares memory": {"params": [weight, bias]},
        "not a dict": [weight],
        "without params": {"lr": 0.1},
        "foreign on one rank": {"params": [nn.Parameter(torch.zeros(2)) if odd else bias]},
        "other parameters": {"params": [weight if odd else bias]},
        "other options": {"params": [weight], "lr": 0.1 if odd else 0.2},
        "fewer": {"params": [weight] if odd else [weight, bias]},
        "nothing": {"params": [] if odd else [weight]},
    }
    if case == "complex":
        extra.requires_grad_(True)
    elif case == "no kernel":
        bias.data = bias.data.double()
    elif case == "shares memory":
        bias.data = weight.data.view(-1)[: bias.numel()]
    elif case == "other optimizer":
        run.model, _ = zeroopt.wrap(run.model, torch.optim.SGD([weight], lr=0.0))
    groups_before = [dict(group) for group in run.inner.param_groups]
    address = weight.data_ptr()
    try:
        run.optimizer.add_param_group(groups[case])
    except Exception as error:  # noqa: BLE001  some are torch's own
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    assert run.inner.param_groups == groups_before and weight.data_ptr() == address
    for one in runs:
        one.step()
        if case not in ("no kernel", "shares memory"):
            one.backward(1)
            one.step()
    return message, equal(*([p.detach() for p in one.optimizer.param_groups[0]["params"]] for one in runs))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("foreign", "ConfigError: parameter 5 of the optimizer (group 1, shape [2]) is not a parameter of the model"),
        ("in another group", "ValueError: some parameters appear in more than one parameter group"),
        ("twice", "ConfigError: parameter 'layers.2.bias' is in the optimizer twice"),
        ("complex", "NotSupportedError: parameter 'extra' is torch.strided torch.complex64"),
        ("no kernel", "ConfigError: fused=True: parameter 'layers.2.bias' is torch.float64"),
        ("coupled", "NotSupportedError: Coupled"),
        ("other optimizer", "ConfigError: parameter 'layers.2.weight' is already trained by another optimizer"),
        ("shares memory", "ConfigError: parameter 'layers.2.weight' and parameter 'layers.2.bias' share memory"),
        ("not a dict", "TypeError: param_group must be a dict"),
        ("without params", "KeyError: 'params'"),
    ],
)
def test_refusals(run_on_ranks: RunOnRanks, case: str, expected: str) -> None:
    for message, undisturbed in run_on_ranks(2, add_wrongly, case):
        assert message.startswith(expected), message
        assert undisturbed


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("foreign on one rank", ["taking up param_groups failed on rank 1: parameter 5 of the optimizer"]),
        ("other parameters", ["rank 0 has [parameter 'layers.2.bias'", "rank 1 has [parameter 'layers.2.weight'"]),
        ("other options", ["lr=0.2", "lr=0.1"]),
        ("fewer", ["rank 0 has [parameter 'layers.2.bias'", "rank 1 has [optimizer AdamW]"]),
        ("nothing", ["rank 0 has [parameter 'layers.2.weight'", "rank 1 has [optimizer AdamW]"]),
    ],
)
def test_ranks_that_add_something_else(run_on_ranks: RunOnRanks, case: str, expected: list[str]) -> None:
    answers = run_on_ranks(3, add_wrongly, case)
    for rank, (message, undisturbed) in enumerate(answers):
        own_problem = case == "foreign on one rank" and rank == 1
        assert message.startswith("ConfigError: parameter 5" if own_problem else "RankMismatchError: ")
        assert own_problem or (message == answers[0][0] and all(part in message for part in expected)), message
        assert undisturbed


def unfreeze_differently() -> tuple[str, str, list[Tensor]]:
    """Each rank thaws another layer; then they agree."""
    run = Run({"bucket_mb": 0.001}, frozen="layers.")
    run.unfreeze("layers.2" if dist.get_rank() == 1 else "layers.0")
    messages = []
    for _ in range(2):  # trying again is no better
        with pytest.raises(zeroopt.RankMismatchError) as caught:
            run.backward(0)
        messages.append(str(caught.value))
    run.unfreeze("layers.")
    run.backward(1)
    run.step()
    return messages[0], messages[1], snapshot(run.net)


def test_ranks_that_unfreeze_something_else(run_on_ranks: RunOnRanks) -> None:
    answers = run_on_ranks(3, unfreeze_differently)
    for first, second, values in answers:
        assert first == second == answers[0][0]
        assert "rank 0 has [parameter 'layers.0.weight'" in first and "rank 1 has [parameter 'layers.2.weight'" in first
        assert equal(values, answers[0][2])


def unfreeze_on_one_rank(transport: str) -> str:
    run = Run({"transport": transport, "process_group": dist.new_group()}, frozen="layers.0")
    if dist.get_rank() == 0:
        run.unfreeze("layers.0")
    lose_patience(1.0)
    with pytest.raises(zeroopt.CollectiveError) as caught:
        run.backward(0)
        run.step()
    return str(caught.value)


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_a_rank_that_unfreezes_alone_does_not_hang(run_on_ranks: RunOnRanks, transport: str) -> None:
    for message in run_on_ranks(2, unfreeze_on_one_rank, transport):
        assert f"transport {transport}" in message


def unfreeze_past_the_model() -> list[Tensor]:
    """The gradient of one rank is refused; after clearing it, the parameter is trained like any other."""
    run = Run({"stage": 2}, frozen="layers.0")
    run.unfreeze("layers.0")
    loss_of(run.net(batch("mlp", 0))).backward()
    with pytest.raises(
        zeroopt.StateError, match=r"'layers\.0\.weight' was frozen and has got a gradient of this rank alone"
    ):
        run.step()
    run.optimizer.zero_grad()
    before = run.net.layers[0].weight.detach().clone()
    run.backward(1)
    run.step()
    assert not torch.equal(before, run.net.layers[0].weight)
    return snapshot(run.net)


def test_unfreezing_past_the_model(run_on_ranks: RunOnRanks) -> None:
    assert equal(*run_on_ranks(2, unfreeze_past_the_model))


def move_before_growth() -> None:
    run = Run({}, frozen="layers.0")
    run.net.scale.data = run.net.scale.data.clone()
    run.unfreeze("layers.0")
    run.backward(0)


def test_growth_does_not_hide_that_a_parameter_has_moved(run_on_ranks: RunOnRanks) -> None:
    for error in run_on_ranks.outcomes(2, move_before_growth):
        assert error.type_name == "StateError"
        assert error.message.startswith("parameter 'scale' no longer lies in zeroopt's storage")


def order_after_growth(stage: int) -> list[bool]:
    """Whether buckets start in the order in which they are complete: before the first step, after it, and after more."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    for layer in (net[0], net[3], net[6]):
        layer.requires_grad_(False)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=stage, bucket_mb=0.0001)
    reducer, right = model._reducer, []

    def check() -> None:
        (model(torch.ones(2, 16)).sum() + 1).backward()
        last = {reducer._filling.arrivals.bucket_of[index]: place for place, index in enumerate(reducer.arrivals)}
        right.append(reducer._sequence == sorted(last, key=last.__getitem__) and len(last) > 5)
        optimizer.step()
        optimizer.zero_grad()

    for thawed in (net[3], net[0], net[6]):
        thawed.requires_grad_(True)
        check()
        check()
    return right


def test_buckets_start_as_gradients_arrive(run_on_ranks: RunOnRanks) -> None:
    for stage in STAGES:
        assert run_on_ranks(2, order_after_growth, stage) == [[True] * 6] * 2


def added_between_backward_and_step() -> bool:
    """The order in which buckets start is not that of a backward which knew nothing of the new parameters."""
    run = Run({"bucket_mb": 0.0001}, left_out="layers.4", lr=0.01)
    run.net.zero_grad()
    run.freeze("layers.4")
    run.backward(0)
    run.add("layers.4")
    run.step()
    run.backward(1)
    run.step()
    run.backward(2)
    reducer = run.model._reducer
    last = {reducer._filling.arrivals.bucket_of[index]: place for place, index in enumerate(reducer.arrivals)}
    return reducer._sequence == sorted(last, key=last.__getitem__)


def test_the_order_waits_for_a_backward_with_all(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, added_between_backward_and_step) == [True, True]


class SideBySide(nn.Module):
    """Layers of growing size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 16 * (i + 1), bias=False) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x).sum() for layer in self.layers)


def memory_over_rounds(options: dict[str, Any]) -> list[tuple[int, int, int]]:
    """After rounds of growth: the transport's buffers beyond those of buckets, pages of shared memory beyond those of its buffers,
    and open descriptors."""
    net = SideBySide()
    net.layers[1:].requires_grad_(False)
    gc.collect()
    before = resident_shared_pages()
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.0001, **options)
    counts = []
    for layer in net.layers:
        layer.requires_grad_(True)
        for _ in range(2):
            model(torch.ones(2, 8)).backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        for _ in range(4):  # until all ranks have heard that all are through with what was collected
            model._transport.barrier()
        buffers, buckets = model._transport._buffers.values(), len(model.replica.buckets)
        per_bucket = 1 if options["stage"] == 2 else 2
        pages = sum(-(-memory.nbytes // PAGESIZE) for buffer in buffers for memory in buffer.of_rank)
        board_pages = -(-_C.ShmBoard.bytes(2) // PAGESIZE)
        beyond = max(0, resident_shared_pages() - before - pages - board_pages)
        counts.append((len(buffers) - per_bucket * buckets, beyond, len(open_memory())))
    return counts


def test_growing_frees_what_it_replaces(run_on_ranks: RunOnRanks) -> None:
    for stage in STAGES:
        for first, *others in run_on_ranks(2, memory_over_rounds, {"stage": stage, "transport": "shm"}):
            assert first[0] == (4 if stage == 2 else 2)  # flags, a scalar, and a pool of two
            assert first[1] == 0
            assert others == [first] * 5
