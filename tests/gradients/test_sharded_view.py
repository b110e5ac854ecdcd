"""param.grad in every stage does what the gradient of DistributedDataParallel does, or says why it cannot."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from training import batch, build, loss_of, optimizer_for, prepare, restore, snapshot
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.collectives import ControlGroup
from zeroopt.gradients.sharded_tensor import ShardedGradient

INF = float("inf")
STAGES = (0, 1, 2)
VARIANTS: list[dict[str, Any] | None] = [
    None,
    {"stage": 0, "fused": True, "bucket_mb": 0.01},
    {"stage": 1, "fused": False, "bucket_mb": 0.002},
    {"stage": 1, "fused": True, "transport": "torch"},
    {"stage": 2, "fused": False, "transport": "pairwise"},
    {"stage": 2, "fused": True, "bucket_mb": 0.01},
]


def variants_for(world_size: int) -> list[dict[str, Any] | None]:
    """Each by two or by three ranks, and so that both see every stage; a rank alone sees all of them."""
    plain, first, second, third, fourth, fifth = VARIANTS
    return {1: VARIANTS, 2: [plain, first, third, fifth], 3: [plain, first, second, fourth]}[world_size]


# A run: its log, and its parameters.
Outcome = tuple[list[float], list[Tensor]]


def check_alike(outcomes: Sequence[Outcome], variants: Sequence[dict[str, Any] | None], what: object) -> None:
    """The first is DDP's."""
    (expected_log, expected), *rest = outcomes
    for variant, (log, values) in zip(variants[1:], rest, strict=True):
        # Norms are float32 sums of thousands of elements, here in another order than torch's.
        assert log == pytest.approx(expected_log, rel=5e-5, nan_ok=True), (what, variant)
        for want, got in zip(expected, values, strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-5, atol=1e-6, msg=lambda text, variant=variant: f"{what}, {variant}: {text}"
            )


# What is done to gradients between backward and step. Each returns what it has found.

Edit = Callable[[nn.Module, torch.optim.Optimizer], Sequence[Tensor | float] | None]


def clip_by_norm(norm_type: float, foreach: bool | None, which: slice = slice(None)) -> Edit:
    def edit(net: nn.Module, _: Any) -> list[Tensor]:
        return [clip_grad_norm_(list(net.parameters())[which], 0.1, norm_type, foreach=foreach)]

    return edit


def clip_each(net: nn.Module, _: Any) -> list[Tensor]:
    return [clip_grad_norm_(param, 0.05) for param in net.parameters()]


def clip_by_value(foreach: bool | None) -> Edit:
    return lambda net, _: clip_grad_value_(net.parameters(), 0.003, foreach=foreach)


def clip_in_two_parts(net: nn.Module, _: Any) -> list[Tensor]:
    grads = [param.grad for param in net.parameters() if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, 2.0, foreach=True)
    torch.nn.utils.clip_grads_with_norm_(net.parameters(), 0.1, norm, foreach=True)
    return [norm, torch.nn.utils.get_total_norm(grads, INF)]


def look(net: nn.Module, _: Any) -> list[Tensor]:
    grads = [param.grad for param in net.parameters()]
    return [
        *(grad.norm() for grad in grads),
        *(grad.detach().norm(1) for grad in grads),
        *(grad.data.norm(INF) for grad in grads),
        *(torch.linalg.vector_norm(grad, 3, dtype=torch.float64) for grad in grads),
        *(torch.linalg.norm(grad) for grad in grads),
        *torch._foreach_norm(grads, 2.5),
    ]


def multiply(how: Callable[[Tensor], Any]) -> Edit:
    def edit(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        before = look(net, optimizer)
        with torch.no_grad():
            for param in net.parameters():
                how(param.grad)
        return [*before, *look(net, optimizer)]

    return edit


def multiply_together(how: Callable[[list[Tensor]], None]) -> Edit:
    def edit(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        params = list(net.parameters())
        how([param.grad for param in params])
        how([param.grad for param in params[1:3]])
        return look(net, optimizer)

    return edit


def clear_some(net: nn.Module, _: Any) -> None:
    for param in list(net.parameters())[1::2]:
        param.grad = None


def replace_some(net: nn.Module, _: Any) -> list[Tensor]:
    for seed, param in enumerate(list(net.parameters())[::2]):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    norms = [clip_grad_norm_(net.parameters(), 0.2), clip_grad_norm_(net.parameters(), 0.1, foreach=True)]
    clip_grad_value_(net.parameters(), 0.01)
    return norms


def fail_on_nonfinite(net: nn.Module, _: Any) -> list[float]:
    """The last rank's gradient of one parameter is not finite; clipping refuses, and leaves all gradients as they are."""
    (param,) = [p for p in net.parameters() if p.dim() == 0]
    found: list[float] = []
    for factor in (INF, float("nan")):
        with torch.no_grad():
            param.grad.mul_(factor)  # type: ignore[union-attr]
        for norm_type in (1.0, 2.0, INF):
            with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
                clip_grad_norm_(net.parameters(), 0.1, norm_type, error_if_nonfinite=True)
            found.append(torch.stack([p.grad.norm(norm_type) for p in net.parameters()]).norm(norm_type).item())
    param.grad = None
    return [*found, clip_grad_norm_(net.parameters(), 0.1, error_if_nonfinite=True).item()]


EDITS: dict[str, Edit] = {
    **{f"clip p=2 foreach={f}": clip_by_norm(2.0, f) for f in (None, True, False)},
    **{f"clip p={p} foreach={f}": clip_by_norm(p, f) for p, f in ((1.0, True), (3.0, None), (INF, False), (INF, True))},
    "clip a subset": clip_by_norm(2.0, None, slice(1, 4)),
    "clip a subset together": clip_by_norm(INF, True, slice(2, 6)),
    "clip one": clip_by_norm(2.0, None, slice(2, 3)),
    "clip nothing": clip_by_norm(2.0, None, slice(0)),
    "clip each": clip_each,
    "clip twice": lambda net, _: [clip_grad_norm_(net.parameters(), n, foreach=True) for n in (0.2, 0.1)],
    **{f"clip value foreach={f}": clip_by_value(f) for f in (None, True, False)},
    **({"clip in two parts": clip_in_two_parts} if hasattr(torch.nn.utils, "get_total_norm") else {}),
    "look": look,
    "mul_ number": multiply(lambda grad: grad.mul_(0.3)),
    "mul_ 0-dim": multiply(lambda grad: grad.mul_(torch.tensor(0.3))),
    "mul_ one element": multiply(lambda grad: grad.mul_(torch.full((), -0.3, dtype=torch.float64))),
    "*=": multiply(lambda grad: grad.__imul__(3)),
    "div_ number": multiply(lambda grad: grad.div_(3)),
    "div_ 0-dim": multiply(lambda grad: grad.data.div_(torch.tensor(7.0))),
    "zero_": multiply(lambda grad: grad.zero_()),
    "clamp_": multiply(lambda grad: grad.clamp_(-0.002, 0.001)),
    "nan_to_num_": multiply(lambda grad: grad.mul_(INF).nan_to_num_(nan=0.1, posinf=0.01, neginf=-0.01)),
    "noise": multiply(
        lambda grad: grad.add_(torch.randn(grad.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
    ),
    "mask": multiply(lambda grad: grad.mul_(torch.arange(grad.numel()).reshape(grad.shape) % 2 == 0)),
    "_foreach_mul_": multiply_together(lambda grads: torch._foreach_mul_(grads, 0.3)),
    "_foreach_mul_ 0-dim": multiply_together(lambda grads: torch._foreach_mul_(grads, torch.tensor(0.3))),
    "_foreach_div_": multiply_together(lambda grads: torch._foreach_div_(grads, 3.0)),
    "_foreach_zero_": multiply_together(lambda grads: torch._foreach_zero_(grads)),
    "clear some": clear_some,
    "clear all": lambda net, _: net.zero_grad(),
    "zeros": lambda net, _: net.zero_grad(set_to_none=False),
    "optimizer's zeros": lambda net, optimizer: optimizer.zero_grad(set_to_none=False),
    "replace some": replace_some,
    "non-finite": fail_on_nonfinite,
    "model to the same device": lambda net, _: net.to("cpu").float() and None,
}


def train_edited(options: dict[str, Any] | None) -> dict[str, Outcome]:
    net = build("mlp")
    start = snapshot(net)
    # Weight decay tells a gradient of zero from none.
    model, optimizer = prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1), options)
    outcomes = {}
    for name, edit in EDITS.items():
        restore(net, start)
        log: list[float] = []
        for step in range(2):
            loss_of(model(batch("mlp", step))).backward()
            log += map(float, edit(net, optimizer) or ())
            optimizer.step()
            net.zero_grad()
        outcomes[name] = log, snapshot(net)
    return outcomes


def train_edited_all(variants: list[dict[str, Any] | None]) -> list[dict[str, Outcome]]:
    return [train_edited(options) for options in variants]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_done_to_gradients_does_what_it_does_under_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    variants = variants_for(world_size)
    for by_variant in run_on_ranks(world_size, train_edited_all, variants):
        for name in EDITS:
            check_alike([outcomes[name] for outcomes in by_variant], variants, name)


# Programs: what loops do between steps, in every mixture.


class Trainee:
    """One model on its way through a program of words. Programs follow each other on one wrapped model."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        self.net = build("mlp")
        self.start = snapshot(self.net)
        self.model, self.optimizer = prepare(self.net, optimizer_for("sgd_momentum", self.net), options)
        self.params = list(self.net.parameters())

    def run(self, program: str) -> Outcome:
        restore(self.net, self.start)
        self.backwards = 0
        self.log: list[float] = []
        for word in program.split():
            getattr(self, word)()
        return self.log, snapshot(self.net)

    def backward(self) -> None:
        self.backwards += 1
        loss_of(self.model(batch("mlp", self.backwards))).backward()

    def local(self) -> None:
        with self.model.no_sync():  # type: ignore[operator]
            self.backward()

    def local_alias(self) -> None:
        """The gradient that autograd adds is the caller's tensor, who goes on using it."""
        grad = torch.full((), 0.5)
        with self.model.no_sync():  # type: ignore[operator]
            self.net.scale.backward(grad)
        grad.zero_()

    def step(self) -> None:
        self.optimizer.step()

    def clip(self) -> None:
        self.log.append(clip_grad_norm_(self.params, 0.1).item())

    def clip_together(self) -> None:
        self.log.append(clip_grad_norm_(self.params, 0.07, foreach=True).item())

    def clip_value(self) -> None:
        if any(param.grad is not None for param in self.params):  # torch raises where there are none
            clip_grad_value_(self.params, 0.01)

    def double(self) -> None:
        for param in self.params[2:5]:
            if param.grad is not None:
                param.grad.mul_(2.0)

    def look(self) -> None:
        self.log += [param.grad.norm().item() for param in self.params if param.grad is not None]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def zero_bare(self) -> None:
        self.net.zero_grad()

    def zeros(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def zeros_bare(self) -> None:
        self.net.zero_grad(set_to_none=False)

    def clear_some(self) -> None:
        for param in self.params[::2]:
            param.grad = None

    def replace(self) -> None:
        for param in self.params[1:4]:
            param.grad = torch.full_like(param, 0.01)


# Each row of nine runs on models of its own, whose buckets are planned anew in the first step.
PROGRAMS = [
    "backward clip_together step backward look step",
    "backward step zero_bare backward step",
    "backward clear_some step backward step",
    "backward clear_some backward step",
    "backward zero_bare backward step",
    "backward zeros_bare backward step",
    "backward zeros_bare step zeros step",
    "backward local zeros_bare backward step",
    "backward local zero_bare step backward step",
    "backward double step backward clip step",
    "local zero_bare step backward step",
    "local backward local local backward step",
    "backward backward local backward clip step",
    "backward local clear_some backward step",
    "backward local_alias local_alias backward clip step",
    "backward clip backward clip step",
    "backward clip_together local backward look step",
    "backward look step look backward look step",
    "backward clip_together double backward look step",
    "replace clip_together step backward look step",
    "replace step backward step",
    "replace clip step step",
    "replace backward step",
    "backward replace clip clip_together step",
    "backward replace local backward step",
    "backward step backward step zero_grad backward step",
    "step backward zero_grad step backward step",
]
BACKWARDS = ("backward", "local")
CLEARING = ("zero_grad", "zero_bare")
USING = ("step", "clip", "clip_together", "clip_value", "double", "look", "zeros_bare", "clear_some")


def random_program(random_numbers: random.Random) -> str:
    words = ["zero_grad"]
    while len(words) < 12:
        # zeroopt refuses to use gradients that are not reduced.
        last = [word for word in words if word in (*BACKWARDS, *CLEARING)][-1]
        choice = (*BACKWARDS, *CLEARING) if last == "local" else (*BACKWARDS, *BACKWARDS, *CLEARING, *USING)
        words.append(random_numbers.choice((*choice, "replace") if last == "backward" else choice))
    return " ".join([*words, "backward clip step"])


def run_programs(programs: list[str], variants: list[dict[str, Any] | None]) -> list[list[Outcome]]:
    """By variant and program."""
    trainees = [Trainee(options) for options in variants]
    return [[trainee.run(f"{program} zero_grad") for program in programs] for trainee in trainees]


@pytest.mark.parametrize("first", range(0, len(PROGRAMS), 9))
@pytest.mark.parametrize("world_size", [2, 3])
def test_programs_follow_ddp(run_on_ranks: RunOnRanks, world_size: int, first: int) -> None:
    random_numbers = random.Random(10 * world_size + first)
    programs = [*PROGRAMS[first : first + 9], *(random_program(random_numbers) for _ in range(6))]
    variants = variants_for(world_size)
    for by_variant in run_on_ranks(world_size, run_programs, programs, variants):
        for program, *outcomes in zip(programs, *by_variant, strict=True):
            check_alike(outcomes, variants, f"{program}, after {programs}")


# The object itself.


def wrapped(name: str = "mlp", **options: Any) -> tuple[nn.Module, zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
    net = build(name)
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), **options)
    return net, model, optimizer


def describe() -> list[tuple[Any, ...]]:
    described = []
    for dtype in (None, torch.bfloat16):
        net, model, _ = wrapped(param_dtype=dtype, cast_inputs=dtype is not None)
        loss_of(model(batch("mlp", 0))).backward()
        for param in net.parameters():
            grad = param.grad
            assert type(grad) is ShardedGradient and isinstance(grad, Tensor) and grad is param.grad
            assert grad.shape == param.shape and grad.stride() == param.stride() and grad.numel() == param.numel()
            assert grad.device == param.device and not grad.requires_grad and grad.is_leaf and not grad.is_sparse
            assert grad.detach() is grad and grad.data.norm() == grad.norm() and grad.cpu() is grad
        described.append((repr(net.layers[0].weight.grad), str(net.scale.grad), net.scale.grad.dtype))  # type: ignore[union-attr]
    return described


def test_what_it_says_of_itself(run_on_ranks: RunOnRanks) -> None:
    expected = "ShardedGradient('layers.0.weight', shape=[33, 7], dtype=torch.float32)"
    for described in run_on_ranks(2, describe):
        # Sums are float32, of bfloat16 parameters too.
        assert described == [(expected, "ShardedGradient('scale', shape=[], dtype=torch.float32)", torch.float32)] * 2


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda grad: grad.clone(),
    "+": lambda grad: grad + 1,
    "+ reversed": lambda grad: torch.ones(33, 7) + grad,
    "*": lambda grad: grad * 2,
    "-": lambda grad: -grad,
    "mul_ of a tensor": lambda grad: torch.ones(33, 7).mul_(grad),
    "out": lambda grad: torch.mul(grad, 2, out=torch.ones(33, 7)),
    "foreach add": lambda grad: torch._foreach_add([grad], 1.0),
    "foreach add_ of tensors": lambda grad: torch._foreach_add_([torch.ones(33, 7)], [grad]),
    "[0]": lambda grad: grad[0],
    "[0] =": lambda grad: grad.__setitem__(0, 1.0),
    "[rows] =": lambda grad: grad.__setitem__(torch.ones(33, dtype=torch.bool), 1.0),
    "[mask] = tensor": lambda grad: grad.__setitem__(torch.ones(33, 7, dtype=torch.bool), torch.ones(231)),
    "[mask]": lambda grad: grad[torch.ones(33, 7, dtype=torch.bool)],
    "where": lambda grad: torch.where(torch.ones(33, 7, dtype=torch.bool), grad, 0.0),
    "** 2": lambda grad: grad**2,
    "isfinite": torch.isfinite,
    "histc": lambda grad: torch.histc(grad, 10),
    "max": lambda grad: grad.max(),
    "cumsum_": lambda grad: grad.cumsum_(0),
    "renorm_": lambda grad: grad.renorm_(2, 0, 1.0),
    "t_": lambda grad: grad.t_(),
    "dropout": lambda grad: torch.nn.functional.dropout(grad, inplace=True),
    "view": lambda grad: grad.view(-1),
    "abs": abs,
    "sum": lambda grad: grad.sum(),
    "isnan": lambda grad: torch.isnan(grad).any(),
    "numpy": lambda grad: grad.numpy(),
    "np.asarray": np.asarray,
    "tolist": lambda grad: grad.tolist(),
    "double": lambda grad: grad.double(),
    "data_ptr": lambda grad: grad.data_ptr(),
    "share_memory_": lambda grad: grad.share_memory_(),
    "from_dlpack": torch.from_dlpack,
    "zeros_like": torch.zeros_like,
    "stack": lambda grad: torch.stack([torch.ones(33, 7), grad]),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda grad: torch.save({"grad": grad}, io.BytesIO()),
    "norm of rows": lambda grad: grad.norm(dim=1),
    "norm keepdim": lambda grad: torch.linalg.vector_norm(grad, keepdim=True),
    "nuclear norm": lambda grad: grad.norm("nuc"),
    "optimizer": lambda grad: torch.optim.SGD([_param_with(grad)], lr=0.1).step(),
}


def _param_with(grad: Tensor) -> nn.Parameter:
    param = nn.Parameter(torch.ones(33, 7))
    param.grad = grad
    return param


def try_refused() -> dict[str, str]:
    net, model, _ = wrapped()
    loss_of(model(batch("mlp", 0))).backward()
    weight = net.layers[0].weight
    grad, norm = weight.grad, weight.grad.norm()
    messages = {}
    with torch.no_grad():
        for name, use in REFUSED.items():
            try:
                use(grad)
                messages[name] = "not refused"
            except zeroopt.StateError as error:
                messages[name] = str(error)
    for p in (0, -1, -INF):
        with pytest.raises(zeroopt.StateError, match=r"is a p-norm with p > 0 or inf, got p = "):
            grad.norm(p)
    assert grad.norm() == norm
    return messages


def test_what_needs_elements_is_refused(run_on_ranks: RunOnRanks) -> None:
    for messages in run_on_ranks(2, try_refused):
        for name, message in messages.items():
            assert "of a sharded gradient" in message, (name, message)
            assert "optimizer.full_grad" in message, (name, message)


def use_at_the_wrong_time() -> list[str]:
    net, model, optimizer = wrapped()
    weight = net.layers[0].weight
    messages = []

    def note(use: Callable[[], object]) -> None:
        try:
            use()
            messages.append("no error")
        except zeroopt.StateError as error:
            messages.append(str(error))

    loss_of(model(batch("mlp", 0))).backward()
    grad = weight.grad
    with model.no_sync():
        loss_of(model(batch("mlp", 1))).backward()
    note(lambda: grad.norm())
    note(lambda: clip_grad_norm_(net.parameters(), 1.0))
    note(lambda: grad.mul_(2))
    note(optimizer.step)
    optimizer.zero_grad()
    note(lambda: grad.mul_(2))

    loss_of(model(batch("mlp", 0))).backward()
    wrong = build("mlp")
    wrong_model, wrong_optimizer = zeroopt.wrap(wrong, optimizer_for("sgd", wrong))
    wrong.layers[0].weight.grad = weight.grad
    note(wrong_optimizer.step)
    del wrong_model, model, optimizer
    gc.collect()
    note(lambda: weight.grad.norm())
    note(lambda: weight.sum().backward())
    return messages


def test_wrong_times_are_named(run_on_ranks: RunOnRanks) -> None:
    for norm, clip, mul, step, cleared, foreign, gone, backward in run_on_ranks(2, use_at_the_wrong_time):
        assert all("the last backward ran under no_sync()" in message for message in (norm, clip, mul, step))
        assert cleared == "the gradient of 'layers.0.weight' was cleared; it is not param.grad any more"
        assert foreign.startswith(
            "param.grad of 'layers.0.weight' was set to the sharded gradient of 'layers.0.weight'"
        )
        for message in (gone, backward):
            assert message.startswith("the gradient of 'layers.0.weight' is gone: nothing refers to the wrapped model")


def use_in_hooks(use: str) -> tuple[list[str], list[float]]:
    """What hooks on parameters see in a second backward, and what happens when they use it; then a step that goes well."""
    net, model, optimizer = wrapped(stage=2)  # one bucket, so that no gradient has to wait for a buffer
    loss_of(model(batch("mlp", 1))).backward()
    seen: list[str] = []

    def hook(param: Tensor) -> None:
        seen.append(type(param.grad).__name__)
        if use == "norm":
            param.grad.norm()  # type: ignore[union-attr]
        elif use == "add to another":
            net.scale.grad.add_(torch.ones_like(net.scale))  # type: ignore[union-attr]

    handles = [param.register_post_accumulate_grad_hook(hook) for param in net.parameters()]
    try:
        loss_of(model(batch("mlp", 0))).backward()
        loss_of(model(batch("mlp", 0))).backward()  # by now, hooks of ours are the last
    except zeroopt.StateError as error:
        seen = [str(error)]
    if use == "norm":  # the backward did not come to its end
        return seen, []
    for handle in handles:
        handle.remove()
    optimizer.zero_grad()
    loss_of(model(batch("mlp", 0))).backward()
    return seen, [optimizer.clip_grad_norm_(1.0).item()]


def test_hooks_of_the_user(run_on_ranks: RunOnRanks) -> None:
    for seen, norms in run_on_ranks(2, use_in_hooks, "nothing"):
        assert seen == ["ShardedGradient"] * 14 and norms[0] > 0
        expected = norms
    for (message,), norms in run_on_ranks(2, use_in_hooks, "add to another"):
        assert message.startswith("the gradient of 'scale' was changed while backward ran")
        assert norms == expected
    for (message,), _ in run_on_ranks(2, use_in_hooks, "norm"):
        assert message.startswith("a sharded gradient was used while backward runs")


def copy_the_model() -> bool:
    """A copy has its own parameters, without gradients, and is of no consequence."""
    net, model, optimizer = wrapped()
    loss_of(model(batch("mlp", 0))).backward()
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    twins.append(torch.load(file, weights_only=False))
    for twin in twins:
        assert all(param.grad is None for param in twin.parameters())
        loss_of(twin(batch("mlp", 0))).backward()
        assert all(type(param.grad) is Tensor for param in twin.parameters())
    optimizer.step()
    return all(torch.equal(a, b) for a, b in zip(snapshot(net), snapshot(twins[0]), strict=True))


def test_copies_of_the_model_have_no_gradients(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, copy_the_model) == [False, False]


def keep_only_gradients() -> list[bool]:
    net, model, optimizer = wrapped()
    loss_of(model(batch("mlp", 0))).backward()
    optimizer.step()
    grads = [param.grad for param in net.parameters()]
    parts = [weakref.ref(part) for part in (net, model, optimizer, model._reducer, model._reducer.view, net.scale)]
    del net, model, optimizer
    gc.collect()
    assert len(grads) == 7
    return [part() is None for part in parts]


def test_gradients_keep_nothing_alive(run_on_ranks: RunOnRanks) -> None:
    for gone in run_on_ranks(2, keep_only_gradients):
        assert all(gone), gone


def two_models_in_one_call() -> list[float]:
    """Gradients of two wrapped models and of one that is not, in one call."""
    norms = []
    for kind in ("zeroopt", "ddp"):
        nets = [build("mlp"), build("lm"), build("conv")]
        plain = DistributedDataParallel(nets[2])
        wraps: list[Any] = [plain if net is nets[2] else DistributedDataParallel(net) for net in nets]
        if kind == "zeroopt":
            wraps = [zeroopt.wrap(net, optimizer_for("sgd", net), bucket_mb=0.01)[0] for net in nets[:2]] + [plain]
        for name, model in zip(("mlp", "lm", "conv"), wraps, strict=True):
            loss_of(model(batch(name, 0))).backward()
        params = [param for net in (nets[2], nets[0], nets[1]) for param in net.parameters()][::-1]
        norms.append([clip_grad_norm_(params, 0.1, foreach=foreach).item() for foreach in (True, None, True)])
        grads = [param.grad for param in params if param.grad is not None]
        norms[-1] += [norm.item() for norm in torch._foreach_norm(grads)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    return norms[0]


def test_gradients_of_several_models(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, two_models_in_one_call)
    assert first == second


def count_exchanges() -> list[int]:
    """How often ranks talk for norms: of all gradients, once; again only for those that have changed since."""
    net, model, optimizer = wrapped(bucket_mb=0.002)
    counts = []
    for step in range(2):
        loss_of(model(batch("mlp", step))).backward()
        for edit in (clip_by_norm(2.0, None), clip_by_norm(2.0, True), clip_each, look, look):
            with patch.object(ControlGroup, "gather", autospec=True, side_effect=ControlGroup.gather) as spy:
                edit(net, optimizer)
            counts.append(spy.call_count)
        optimizer.step()
        optimizer.zero_grad()
    return counts


def test_norms_are_exchanged_once(run_on_ranks: RunOnRanks) -> None:
    # look asks for five kinds of norms, one of which clip_each has asked for, before it changed them all.
    assert run_on_ranks(2, count_exchanges) == [[1, 1, 1, 5, 0] * 2] * 2


class Branches(nn.Module):
    """Which branches run depends on the rank and on the call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 5)
        self.even, self.odd, self.late, self.never = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step * 10 + dist.get_rank())
        x = self.trunk(torch.randn(3, 5, generator=generator))
        x = self.even(x) if dist.get_rank() % 2 == 0 else self.odd(x)
        return loss_of(x if step % 2 == 0 else self.late(x))


def use_branches(options: dict[str, Any] | None) -> tuple[list[list[bool]], Outcome]:
    """Gradients are cleared through the bare model. What each backward leaves None, norms, and the parameters."""
    net = Branches()
    # Weight decay and momentum move a parameter with a gradient of zero, but not one without.
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    model: nn.Module
    if options is None:
        model = DistributedDataParallel(net, find_unused_parameters=True)
    else:
        model, optimizer = zeroopt.wrap(net, optimizer, **options)
    missing, log = [], []
    for step in range(1, 5):
        model(step).backward()
        if step == 3:
            model(6).backward()
        missing.append([param.grad is None for param in net.parameters()])
        log.append(clip_grad_norm_(net.parameters(), 0.3).item())
        optimizer.step()
        net.zero_grad()
    return missing, (log, snapshot(net))


def use_branches_all() -> list[tuple[list[list[bool]], Outcome]]:
    return [use_branches(options) for options in VARIANTS]


@pytest.mark.parametrize("world_size", [2, 3])
def test_unused_parameters(run_on_ranks: RunOnRanks, world_size: int) -> None:
    for by_variant in run_on_ranks(world_size, use_branches_all):
        expected = by_variant[0][0]
        assert any(any(flags) for flags in expected)
        for options, (missing, _) in zip(VARIANTS, by_variant, strict=True):
            assert missing == expected, options
        check_alike([outcome for _, outcome in by_variant], VARIANTS, "branches")


def compile_with_gradients(stage: int) -> list[float]:
    """Compile the model, or a part of it, while gradients are there; accumulate into them and step."""
    torch._dynamo.reset()
    norms = []
    for compiled in (False, True):
        net, model, optimizer = wrapped(stage=stage, transport="shm")
        loss_of(model(batch("mlp", 0))).backward()
        if compiled:
            net.layers = torch.compile(net.layers, backend="aot_eager")
        for step in range(1, 3):
            loss_of(model(batch("mlp", step))).backward()
            norms.append(clip_grad_norm_(net.parameters(), 1.0).item())
            optimizer.step()
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-5)
    return norms


@pytest.mark.parametrize("stage", STAGES)
def test_compiling_while_there_are_gradients(run_on_ranks: RunOnRanks, stage: int) -> None:
    first, second = run_on_ranks(2, compile_with_gradients, stage)
    assert first == second
