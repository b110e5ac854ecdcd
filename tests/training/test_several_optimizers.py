"""Several optimizers on one model do what they do on a DistributedDataParallel model."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from training import batch, build, loss_of, prepare_all, restore, snapshot
from worker_pool import RunOnRanks

import zeroopt

STAGES = (0, 1, 2)
Options = dict[str, Any] | None
Optimizers = list[torch.optim.Optimizer]


def optimizers_for(net: nn.Module, count: int = 2) -> Optimizers:
    """One for matrices and one for the rest; or two for matrices, which take turns from layer to layer."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    rest = torch.optim.AdamW([p for p in net.parameters() if p.dim() <= 1], lr=0.01, betas=(0.8, 0.95))
    if count == 2:
        return [torch.optim.SGD(matrices, lr=0.1, momentum=0.9, nesterov=True), rest]
    return [torch.optim.SGD(matrices[::2], lr=0.1), torch.optim.RMSprop(matrices[1::2], lr=0.001), rest]


def backward(model: nn.Module, name: str, step: int) -> None:
    loss_of(model(batch(name, step))).backward()


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_close(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def train(name: str, options: Options, count: int, follow: list[list[Tensor]] | None = None) -> list[list[Tensor]]:
    """Parameters and buffers after each step; with `follow`, each step starts from those of another run."""
    net = build(name)
    model, optimizers = prepare_all(net, optimizers_for(net, count), options)
    history = []
    for step in range(3):
        backward(model, name, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append(snapshot(net))
        if follow is not None:
            restore(net, follow[step])
    return history


def train_variants(name: str, variants: list[Options], count: int) -> list[list[list[Tensor]]]:
    first = train(name, variants[0], count)
    return [first, *(train(name, options, count, first) for options in variants[1:])]


@pytest.mark.parametrize(
    ("name", "world_size", "count"), [("lm", 2, 2), ("lm", 3, 3), ("conv", 2, 3), ("conv", 3, 2), ("mlp", 2, 3)]
)
def test_parity(run_on_ranks: RunOnRanks, name: str, world_size: int, count: int) -> None:
    variants = [
        {"stage": stage, "fused": fused, "bucket_mb": bucket_mb, "transport": transport}
        for fused in (False, True if count == 2 else "auto")
        for stage in STAGES
        for bucket_mb, transport in ((25.0, "shm"), (0.001, "shm"), (0.002, "pairwise"))
    ]
    half = len(variants) // 2
    for ddp, *wrapped in run_on_ranks(world_size, train_variants, name, [None, *variants], count):
        for number, history in enumerate(wrapped):
            for got, want, alike in zip(history, ddp, wrapped[number // half * half], strict=True):
                assert equal(got, alike), f"{variants[number]} differs from other stages, bucket sizes and transports"
                if world_size == 2 and number < half:
                    assert equal(got, want), variants[number]
                else:
                    check_close(got, want)


# What loops do with two optimizers. Each takes the model, its optimizers and the number of the step.

Script = Callable[[nn.Module, Optimizers, int], None]


def every_other_step(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """The second optimizer steps every other time, with the gradients of both."""
    backward(model, "mlp", step)
    for optimizer in optimizers if step % 2 else optimizers[:1]:
        optimizer.step()
        optimizer.zero_grad()


def clear_one(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """The gradients of the second are never cleared; those of the first are before the second is stepped."""
    backward(model, "mlp", step)
    optimizers[0].step()
    optimizers[0].zero_grad(set_to_none=step % 2 == 0)
    optimizers[1].step()


def accumulate(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    for micro in range(3):
        backward(model, "mlp", 10 * step + micro)
    for optimizer in reversed(optimizers):
        optimizer.step()
        optimizer.zero_grad()


def accumulate_alone(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """Under `no_sync()`. Clearing the first between backwards drops its gradients, and leaves those of the second."""
    for micro in range(4):
        with model.no_sync() if micro == 2 or micro < step else nullcontext():  # type: ignore[operator]
            backward(model, "mlp", 10 * step + micro)
        if micro == 2:
            optimizers[0].zero_grad(set_to_none=step % 2 == 0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def clip_each(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """Each clips by the norm of its own gradients."""
    backward(model, "mlp", step)
    for max_norm, optimizer in zip((0.05, 0.02), optimizers, strict=True):
        if isinstance(optimizer, zeroopt.ZeroOptimizer):
            norm = optimizer.clip_grad_norm_(max_norm)
            assert optimizer.grad_norm == norm
        else:
            clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def clip_all(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """torch's clipping over all parameters, which `max_grad_norm` replaces."""
    backward(model, "mlp", step)
    if not _clips_itself(optimizers):
        clip_grad_norm_(model.parameters(), 0.05)
    for optimizer in optimizers if step % 2 else reversed(optimizers):
        optimizer.step()
        optimizer.zero_grad()


def _clips_itself(optimizers: Optimizers) -> bool:
    return isinstance(optimizers[0], zeroopt.ZeroOptimizer) and optimizers[0]._config.max_grad_norm is not None


def in_turns(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """A backward for each optimizer. In some of them, a rank has none."""
    for number, optimizer in enumerate(optimizers):
        for other in optimizers:
            other.zero_grad()
        _backward_unless(model, 2 * step + number, alone=(step, number) in ((0, 1), (2, 0), (3, 1)))
        optimizer.step()


def without_backward(model: nn.Module, optimizers: Optimizers, step: int) -> None:
    """Rank 1 has no backward in one step, and rank 0 in another one."""
    _backward_unless(model, step, alone=step == 1 or step == 3)
    for optimizer in optimizers:
        if isinstance(optimizer, zeroopt.ZeroOptimizer) and step == 3:
            assert optimizer.grad_norm > 0
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def _backward_unless(model: nn.Module, step: int, *, alone: bool) -> None:
    """A backward of this rank's batch. With `alone`, one rank has none, for which DDP needs one with a loss of zero."""
    if not alone or dist.get_rank() != step % 2:
        backward(model, "mlp", step)
    elif isinstance(model, DistributedDataParallel):
        (loss_of(model(batch("mlp", step))) * 0).backward()


SCRIPTS: dict[str, Script] = {
    script.__name__: script
    for script in (
        every_other_step,
        clear_one,
        accumulate,
        accumulate_alone,
        clip_each,
        clip_all,
        in_turns,
        without_backward,
    )
}


def run_script(script: str, options: Options) -> list[Tensor]:
    net = build("mlp")
    model, optimizers = prepare_all(net, optimizers_for(net), options)
    for step in range(4):
        SCRIPTS[script](model, optimizers, step)
    return snapshot(net)


def run_scripts(scripts: list[str], variants: list[Options]) -> dict[str, list[list[Tensor]]]:
    return {script: [run_script(script, options) for options in variants] for script in scripts}


@pytest.mark.parametrize("world_size", [2, 3])
def test_loops_with_two_optimizers(run_on_ranks: RunOnRanks, world_size: int) -> None:
    """Two ranks and three take turns in the variants, so that each stage and each transport is seen by both."""
    variants = [
        {"stage": stage, "fused": fused, "bucket_mb": bucket_mb, "transport": transport}
        for stage in STAGES
        for fused, bucket_mb, transport in ((False, 0.001, "shm"), (True, 25.0, "shm"), (True, 0.001, "pairwise"))
    ]
    variants += [{"bucket_mb": 0.001, "share_parameters": True}, {"bucket_mb": 0.001, "overlap": False}]
    for rank in run_on_ranks(world_size, run_scripts, list(SCRIPTS), [None, *variants[world_size % 2 :: 2]]):
        for ddp, *wrapped in rank.values():
            for values in wrapped:
                check_close(values, ddp)


def test_max_grad_norm_is_over_all_optimizers(run_on_ranks: RunOnRanks) -> None:
    variants = [{"stage": stage, "max_grad_norm": 0.05, "bucket_mb": b} for stage in STAGES for b in (25.0, 0.001)]
    for rank in run_on_ranks(3, run_scripts, ["clip_all"], [None, *variants]):
        ddp, *wrapped = rank["clip_all"]
        for values in wrapped:
            check_close(values, ddp)


def wrap_later(options: Options) -> list[Tensor]:
    """The second optimizer comes when the first has taken two steps, and its buckets have been planned anew."""
    net = build("mlp")
    first, second = optimizers_for(net)
    model, optimizers = prepare_all(net, [first], options)
    for step in range(4):
        if step == 2:
            net.zero_grad()
            model, further = prepare_all(net if options is None else model, [second], options)
            optimizers += further
        backward(model, "mlp", step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return snapshot(net)


def wrap_later_all(variants: list[Options]) -> list[list[Tensor]]:
    return [wrap_later(options) for options in variants]


def test_a_second_optimizer_may_come_later(run_on_ranks: RunOnRanks) -> None:
    variants = [
        {"stage": stage, "fused": False, "bucket_mb": 0.001, "transport": transport}
        for stage in STAGES
        for transport in ("shm", "pairwise")
    ]
    for ddp, *wrapped in run_on_ranks(2, wrap_later_all, [None, *variants]):
        for options, values in zip(variants, wrapped, strict=True):
            assert equal(values, ddp), options


class Branches(nn.Module):
    """Which branches run depends on the rank; one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.even, self.odd, self.never = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.even(x) if dist.get_rank() % 2 == 0 else self.odd(x)


def step_unreduced_gradients(stage: int) -> str:
    """Clearing the gradients of one optimizer does not reduce those of the other."""
    net = build("mlp")
    model, (first, second) = prepare_all(net, optimizers_for(net), {"stage": stage})
    with model.no_sync():  # type: ignore[operator]
        backward(model, "mlp", 0)
    first.zero_grad()
    with pytest.raises(zeroopt.StateError) as caught:
        second.step()
    second.zero_grad()
    backward(model, "mlp", 1)
    second.step()
    return str(caught.value)


def test_unreduced_gradients_of_one_optimizer(run_on_ranks: RunOnRanks) -> None:
    for stage in STAGES:
        for message in run_on_ranks(2, step_unreduced_gradients, stage):
            assert message.startswith("the last backward ran under no_sync()")


def train_branches(options: Options) -> list[Tensor]:
    torch.manual_seed(0)
    net = Branches()
    # Weight decay and momentum move a parameter whose gradient is zero, but not one that has none.
    first = torch.optim.SGD([*net.trunk.parameters(), *net.odd.parameters()], lr=0.1, momentum=0.9, weight_decay=0.5)
    second = torch.optim.SGD([*net.even.parameters(), *net.never.parameters()], lr=0.1, weight_decay=0.5)
    model, optimizers = prepare_all(net, [first, second], options)
    for step in range(4):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(step * 10 + dist.get_rank()))
        loss_of(model(x)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return snapshot(net)


def train_branches_all(variants: list[Options]) -> list[list[Tensor]]:
    return [train_branches(options) for options in variants]


@pytest.mark.parametrize("world_size", [2, 3])
def test_unused_parameters(run_on_ranks: RunOnRanks, world_size: int) -> None:
    variants = [
        {"stage": stage, "bucket_mb": bucket_mb, "transport": transport}
        for stage in STAGES
        for bucket_mb, transport in ((25.0, "shm"), (0.0001, "shm"), (0.0001, "pairwise"))
    ]
    for ddp, *wrapped in run_on_ranks(world_size, train_branches_all, [None, *variants]):
        for values in wrapped:
            check_close(values, ddp)


def train_with_schedulers(options: Options) -> tuple[list[Tensor], list[float]]:
    net = build("mlp")
    optimizers = optimizers_for(net)
    early = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 0.5**step)
    model, optimizers = prepare_all(net, optimizers, options)
    late = torch.optim.lr_scheduler.StepLR(optimizers[1], step_size=2, gamma=0.1)
    for step in range(4):
        backward(model, "mlp", step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        early.step()
        late.step()
    return snapshot(net), [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def test_schedulers(run_on_ranks: RunOnRanks) -> None:
    want, lrs = run_on_ranks(2, train_with_schedulers, None)[0]
    for got, mine in run_on_ranks(2, train_with_schedulers, {"stage": 2, "fused": False}):
        assert mine == lrs and equal(got, want)


def train_scaled(options: Options, unscale: str, overflow: int) -> tuple[list[Tensor], list[float]]:
    """With a GradScaler. In one step, a gradient of one optimizer's parameters is not finite on one rank."""
    net = build("mlp")
    fault = [1.0]
    poisoned = net.layers[2].weight if overflow == 0 else net.layers[2].bias
    poisoned.register_hook(lambda grad: grad * fault[0])
    model, optimizers = prepare_all(net, optimizers_for(net), options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for step in range(5):
        fault[0] = float("inf") if step == 2 and dist.get_rank() == 1 else 1.0
        scaler.scale(loss_of(model(batch("mlp", step)))).backward()
        for optimizer in optimizers if unscale != "no" else ():
            scaler.unscale_(optimizer)
        if unscale == "and clip" and not _clips_itself(optimizers):
            clip_grad_norm_(model.parameters(), 0.05)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return snapshot(net), scales


def train_scaled_all(variants: list[Options], unscale: str) -> list[list[tuple[list[Tensor], list[float]]]]:
    return [[train_scaled(options, unscale, overflow) for options in variants] for overflow in (0, 1)]


@pytest.mark.parametrize("unscale", ["no", "yes", "and clip"])
def test_grad_scaler(run_on_ranks: RunOnRanks, unscale: str) -> None:
    variants: list[Options] = [{"stage": s, "fused": f, "bucket_mb": 0.001} for s in STAGES for f in (False, True)]
    if unscale == "and clip":
        variants += [{"stage": stage, "max_grad_norm": 0.05} for stage in STAGES]
    for rank in run_on_ranks(2, train_scaled_all, [None, *variants], unscale):
        for (want, scales), *wrapped in rank:
            assert scales == [1024, 2048, 1024, 1024, 2048]
            for got, mine in wrapped:
                assert mine == scales
                check_close(got, want)


def step_scaled_gradients(stage: int, unscale: bool) -> str:
    net = build("mlp")
    model, optimizers = prepare_all(net, optimizers_for(net), {"max_grad_norm": 1.0, "stage": stage})
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model(batch("mlp", 0)))).backward()
    if unscale:
        scaler.unscale_(optimizers[0])
    with pytest.raises(zeroopt.StateError) as error:
        scaler.step(optimizers[0])
    return str(error.value)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_max_grad_norm_needs_unscaled_gradients(run_on_ranks: RunOnRanks, stage: int, unscale: bool) -> None:
    for message in run_on_ranks(2, step_scaled_gradients, stage, unscale):
        assert "call scaler.unscale_ for each of them" in message


class Tiers(nn.Module):
    """Two parts that may be of different dtypes, each with a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower, self.upper = nn.Sequential(nn.Linear(7, 40), nn.Tanh()), nn.Linear(40, 5)
        for part in (self.lower, self.upper):
            part.register_parameter("extra", nn.Parameter(torch.ones(3), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.lower, self.upper):
            x = part(x.to(next(part.parameters()).dtype))
        return x


REMAINDER = {"param_dtype": torch.bfloat16, "master_weights": "remainder"}
QUANTISED = {**REMAINDER, "state_dtype": torch.int8}
PLAIN = {"fused": False, "param_dtype": None}


def train_tiers(how: str, shared: dict[str, Any], tier: dict[str, Any]) -> list[Tensor]:
    """Two optimizers of one model, or a wrapped model for each of them, which are run one after the other."""
    net = Tiers()
    parts: list[tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]] = [
        (net.lower, torch.optim.AdamW(net.lower.parameters(), lr=0.01), {**shared, **tier}),
        (net.upper, torch.optim.SGD(net.upper.parameters(), lr=0.1, momentum=0.9), {**shared, **PLAIN}),
    ]
    model: nn.Module = net
    optimizers = []
    for part, optimizer, options in reversed(parts) if how == "upper first" else parts:
        wrapped, one = zeroopt.wrap(part if how == "apart" else model, optimizer, **options)
        if how == "apart":
            setattr(model, "lower" if part is net.lower else "upper", wrapped)
        else:
            model = wrapped
        optimizers.append(one)
    for step in range(4):
        backward(model, "mlp", step)
        for one in optimizers:
            one.step()
            one.zero_grad()
    assert net.lower.extra.dtype is torch.bfloat16
    # Frozen parameters follow the optimizer that has them, or the first one: others may never be wrapped.
    assert net.upper.extra.dtype is torch.bfloat16 if how == "lower first" else torch.float32
    return [p.detach().clone() for p in net.parameters() if p.requires_grad]


def train_tiers_all(variants: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[list[Tensor]]:
    return [train_tiers(*variant) for variant in variants]


def test_each_optimizer_has_its_precision(run_on_ranks: RunOnRanks) -> None:
    for stage in STAGES:
        shared = {"stage": stage, "bucket_mb": 0.001}
        variants = [(how, shared, tier) for tier, hows in TIERS for how in hows]
        for quantised, alike, *remainder in run_on_ranks(3, train_tiers_all, variants):
            assert equal(quantised, alike)
            assert equal(remainder[0], remainder[1]) and equal(remainder[0], remainder[2])


# Which numbers rounding draws depends on the parameters that were wrapped before.
TIERS = [(QUANTISED, ("apart", "lower first")), (REMAINDER, ("apart", "lower first", "upper first"))]


def resume(options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Five steps at once; and three steps, a save through a file, other objects, and two more."""
    results = []
    for stop in (5, 3):
        net = build("lm")
        model, optimizers = prepare_all(net, optimizers_for(net), options)
        run_steps(model, optimizers, 0, stop)
        results.append(snapshot(net))
    file = io.BytesIO()
    torch.save([net.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)], file)
    run_steps(model, optimizers, 7, 8)  # what comes after a save must not change what was saved
    file.seek(0)
    weights, *states = torch.load(file, weights_only=True)
    net = build("lm")
    model, optimizers = prepare_all(net, optimizers_for(net), options)
    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    run_steps(model, optimizers, 3, 5)
    return results[0], snapshot(net)


def run_steps(model: nn.Module, optimizers: Optimizers, start: int, stop: int) -> None:
    for step in range(start, stop):
        backward(model, "lm", step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def resume_all(variants: list[dict[str, Any]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    return [resume(options) for options in variants]


def test_save_and_resume_exactly(run_on_ranks: RunOnRanks) -> None:
    variants = [{"stage": s, "fused": f, "bucket_mb": b} for s in STAGES for f, b in ((False, 25.0), ("auto", 0.001))]
    variants.append({**QUANTISED, "state_dtype": torch.float32, "bucket_mb": 0.001})
    for rank in run_on_ranks(3, resume_all, variants):
        for straight, resumed in rank:
            assert equal(straight, resumed)


def load_from_one_optimizer() -> list[str]:
    """What was saved of one optimizer for all, after its buckets were planned anew, and of the other one of two."""
    alone = build("lm")
    model, single = prepare_all(
        alone, [torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)], {"bucket_mb": 0.001}
    )
    run_steps(model, single, 0, 2)
    net = build("lm")
    model, optimizers = prepare_all(net, optimizers_for(net), {"bucket_mb": 0.001})
    run_steps(model, optimizers, 0, 2)
    before = [p.detach().clone() for p in net.parameters()]
    messages = []
    for optimizer, other in ((optimizers[0], single[0]), (optimizers[0], optimizers[1])):
        with pytest.raises(zeroopt.StateError) as caught:
            optimizer.load_state_dict(other.state_dict())
        messages.append(str(caught.value))
    run_steps(model, optimizers, 2, 3)
    assert not equal(before, [p.detach().clone() for p in net.parameters()])
    return messages


def test_state_of_another_layout_is_refused(run_on_ranks: RunOnRanks) -> None:
    for whole, other in run_on_ranks(2, load_from_one_optimizer):
        assert whole == "expected param_groups of [2] parameters, the state dict has [5]"
        assert other == "expected param_groups of [2] parameters, the state dict has [3]"


def buffers_in_use(options: dict[str, Any]) -> list[tuple[int, int, int]]:
    """In each of two backwards: the most full gradient buffers that stage 2 has lent at once, how many buckets are on their way
    for most of the time, and the most matrices whose gradients had to wait in `param.grad`."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    model, optimizers = prepare_all(net, optimizers_for(net), {"stage": 2, "bucket_mb": 0.01, **options})
    reducer = model._reducer
    seen: list[tuple[int, int, int]] = []
    take_up = reducer.take_up

    def count(index: int) -> None:
        take_up(index)
        lent = sum(store.full is not None for store in reducer.stores)
        waiting = sum(type(layer.weight.grad) is Tensor for layer in net)
        seen.append((lent, len(reducer._in_flight), waiting))

    reducer.take_up = count
    most = []
    for _ in range(2):
        model(torch.randn(2, 64)).sum().backward()
        lent, travelling, waiting = zip(*seen, strict=True)
        most.append((max(lent), int(median(travelling)), max(waiting)))
        seen.clear()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return most


@pytest.mark.parametrize(
    ("options", "lent", "travelling"),
    [
        ({"transport": "shm"}, 2, 2),
        ({"transport": "shm", "bucket_buffers": 3}, 3, 3),
        ({"transport": "shm", "overlap": False}, 1, 0),
        ({"transport": "pairwise"}, 2, 1),
        ({"transport": "pairwise", "bucket_buffers": 3}, 3, 2),
    ],
)
def test_stage_2_lends_a_bounded_number_of_buffers(
    run_on_ranks: RunOnRanks, options: dict[str, Any], lent: int, travelling: int
) -> None:
    """The bucket of the vectors, which is complete last, takes none from those of the matrices."""
    for backwards in run_on_ranks(2, buffers_in_use, options):
        for most_lent, mostly_travelling, most_waiting in backwards:
            assert most_lent <= lent
            assert mostly_travelling == travelling
            assert most_waiting <= 1


def wrap_further(case: str) -> tuple[str, bool]:
    """Wrap a second optimizer wrongly: the error, and whether the model can be trained nevertheless."""
    net = build("mlp")
    first, second = optimizers_for(net)
    wrapped: nn.Module
    wrapped, optimizer = zeroopt.wrap(net, first, stage=2, bucket_mb=1.0)
    model: nn.Module = wrapped
    options: dict[str, Any] = {"stage": 2, "bucket_mb": 1.0}
    odd = dist.get_rank() == 1
    if case == "same optimizer":
        second = first
    elif case == "same parameter":
        second = torch.optim.AdamW(net.parameters())
    elif case == "bare module":
        model = net
    elif case == "group":
        options["process_group"] = dist.new_group()
    elif case == "group on one rank":
        group = dist.new_group()
        if odd:
            options["process_group"] = group
    elif case == "bare module on one rank":
        model = net if odd else model
    elif case == "other class on one rank":
        second = torch.optim.SGD(second.param_groups[0]["params"], lr=0.1) if odd else second
    else:
        options |= eval(f"dict({case})", {"torch": torch})
    try:
        zeroopt.wrap(model, second, **options)
    except zeroopt.ZeroOptError as error:
        message = f"{type(error).__name__}: {error}"
    else:
        return "no error", False
    before = net.layers[0].weight.detach().clone()
    backward(wrapped, "mlp", 0)
    optimizer.step()
    return message, not torch.equal(before, net.layers[0].weight)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("same optimizer", "ConfigError: this optimizer is already wrapped; call zeroopt.wrap once for each optimizer"),
        ("same parameter", "ConfigError: parameter 'layers.0.weight' is already trained by another optimizer"),
        ("bare module", "ConfigError: this model is already wrapped; to train it with one more optimizer"),
        ("group", "ConfigError: the model was wrapped with another process_group"),
        (
            "stage=1",
            "ConfigError: the model was wrapped with stage=2 for its first optimizer, and is now wrapped with stage=1",
        ),
        ("bucket_mb=2.0", "ConfigError: the model was wrapped with bucket_mb=1.0"),
        ("overlap=False", "ConfigError: the model was wrapped with overlap=True"),
        ("transport='pairwise'", "ConfigError: the model was wrapped with transport='auto'"),
        ("max_grad_norm=1.0", "ConfigError: the model was wrapped with max_grad_norm=None"),
        ("reduce_dtype=torch.bfloat16", "ConfigError: the model was wrapped with reduce_dtype=None"),
        ("param_dtype=torch.bfloat16, cast_inputs=True", "ConfigError: the model was wrapped with cast_inputs=False"),
        ("fused='yes'", "ConfigError: expected fused to be one of"),
    ],
)
def test_refusals(run_on_ranks: RunOnRanks, case: str, expected: str) -> None:
    for message, trains in run_on_ranks(2, wrap_further, case):
        assert message.startswith(expected), message
        assert trains


@pytest.mark.parametrize(
    ("case", "rank_1", "others"),
    [
        (
            "group on one rank",
            "ConfigError: the model was",
            "RankMismatchError: zeroopt.wrap failed on rank 1: the model",
        ),
        (
            "bare module on one rank",
            "ConfigError: this model",
            "RankMismatchError: zeroopt.wrap failed on rank 1: this",
        ),
        ("other class on one rank", "RankMismatchError: zeroopt.wrap got", "RankMismatchError: zeroopt.wrap got"),
    ],
)
def test_ranks_that_differ(run_on_ranks: RunOnRanks, case: str, rank_1: str, others: str) -> None:
    for rank, (message, trains) in enumerate(run_on_ranks(3, wrap_further, case)):
        assert message.startswith(rank_1 if rank == 1 else others), message
        assert trains


def wrap_inputs_and_tiers() -> list[torch.dtype]:
    """Inputs are cast as the first optimizer says; the second, without param_dtype, needs not say so again."""
    net = Tiers()
    model, _ = zeroopt.wrap(
        net, torch.optim.AdamW(net.lower.parameters()), param_dtype=torch.bfloat16, cast_inputs=True
    )
    model, _ = zeroopt.wrap(model, torch.optim.AdamW(net.upper.parameters()))
    seen: list[torch.dtype] = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    model(batch("mlp", 0))
    return [*seen, net.upper.weight.dtype]


def test_cast_inputs(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, wrap_inputs_and_tiers) == [[torch.bfloat16, torch.float32]] * 2
