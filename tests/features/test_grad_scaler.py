"""torch.amp.GradScaler over sharded gradients: what it does under DistributedDataParallel, on every rank alike."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from training import OptimizerFactory, batch, build, loss_of, optimizer_for, prepare, snapshot
from worker_pool import RunOnRanks

import zeroopt

INF = float("inf")
STAGES = (0, 1, 2)
ZERO: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1, "bucket_mb": 0.002, "transport": "pairwise"},
    {"stage": 2, "bucket_mb": 0.01},
    {"stage": 2, "bucket_mb": 0.01, "share_parameters": True},
]
# Those that divide by a root of the gradient get an eps that keeps rounding as small as it is.
OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, eps=1e-3),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5, eps=1e-3),
}
STEPS = 7
# Overflows by step and rank. With a growth interval of 2 the scale goes down twice and up three times.
OVERFLOWS = {(2, 0), (4, 1), (4, 0)}

# Scales after each step, whether each step was taken, norms, and the parameters at the end.
Outcome = tuple[list[float], list[bool], list[float], list[Tensor]]


def spoil(net: nn.Module, step: int, value: float = INF) -> None:
    """Overflow on one rank, in one element of one parameter, of which it may own nothing."""
    if (step, dist.get_rank()) in OVERFLOWS:
        params = list(net.parameters())
        param = params[(step + dist.get_rank()) % len(params)]
        handle = param.register_hook(lambda grad: _spoilt(grad, value))
        handles.append(handle)


handles: list[Any] = []


def _spoilt(grad: Tensor, value: float) -> Tensor:
    grad = grad.clone()
    grad.view(-1)[-1] = value
    return grad


def train_scaled(optimizer_name: str, options: dict[str, Any] | None, how: str, init_scale: float) -> Outcome:
    net = build("mlp")
    model, optimizer = prepare(net, OPTIMIZERS[optimizer_name](net.parameters()), options)
    scaler = GradScaler("cpu", init_scale=init_scale, growth_factor=1.7, backoff_factor=0.3, growth_interval=2)
    scales, taken, norms = [], [], []
    for step in range(STEPS):
        spoil(net, step, float("nan") if step == 4 else INF)
        for micro in range(2 if how == "accumulate" else 1):
            scaler.scale(loss_of(model(batch("mlp", 10 * step + micro)))).backward()
        while handles:
            handles.pop().remove()
        if how != "step":
            scaler.unscale_(optimizer)
        if how == "clip":
            norms.append(clip_grad_norm_(net.parameters(), 0.1, foreach=step % 2 == 0).item())
        elif how == "clip inf":
            norms.append(clip_grad_norm_(net.parameters(), 0.01, INF).item())
        before = snapshot(net)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(any(not torch.equal(a, b) for a, b in zip(before, snapshot(net), strict=True)))
        scales.append(scaler.get_scale())
    return scales, taken, norms, snapshot(net)


def train_scaled_all(optimizer_name: str, how: str) -> list[Outcome]:
    # A scale that is no power of two: gradients are rounded as they are scaled back.
    fused: list[bool | str] = ["auto", False] if optimizer_name == "rmsprop" else [True, False]
    # Two ranks and three take turns.
    chosen = (fused[(number + dist.get_world_size()) % 2] for number in range(len(ZERO)))
    variants = [None, *({**options, "fused": choice} for options, choice in zip(ZERO, chosen, strict=True))]
    return [train_scaled(optimizer_name, options, how, 1000.0) for options in variants]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("optimizer_name", "how"),
    [
        ("adamw", "step"),
        ("rmsprop", "step"),
        ("sgd", "unscale"),
        ("sgd", "clip"),
        ("sgd", "clip inf"),
        ("rmsprop", "clip"),
        ("adamw", "accumulate"),
    ],
)
def test_scaling_follows_ddp(run_on_ranks: RunOnRanks, world_size: int, optimizer_name: str, how: str) -> None:
    ranks = run_on_ranks(world_size, train_scaled_all, optimizer_name, how)
    for by_variant in ranks:
        scales, taken, norms, expected = by_variant[0]
        assert taken == [step not in (2, 4) for step in range(STEPS)]
        for outcome in by_variant[1:]:
            assert outcome[0] == scales == ranks[0][0][0]
            assert outcome[1] == taken
            assert outcome[2] == pytest.approx(norms, rel=1e-5, nan_ok=True)
            check_close(expected, outcome[3])


def check_close(expected: list[Tensor], values: list[Tensor]) -> None:
    for want, got in zip(expected, values, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Sixteen bits.


def train_half(
    param_dtype: torch.dtype, options: dict[str, Any], how: str, scale: float = 2.0**12
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters as precisely as they are kept, and the gradients that the last step leaves."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(
        net, optimizer_for("adamw", net), param_dtype=param_dtype, cast_inputs=True, bucket_mb=0.005, **options
    )
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=1000)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model(batch("mlp", step)).float())
        if how == "by hand":  # what a scaler does, with the same roundings
            (loss * scale).backward()
            for param in net.parameters():
                param.grad.mul_(1 / scale)  # type: ignore[union-attr]
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        if how == "unscale":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    grads = [optimizer.full_grad(param) for param in net.parameters()]
    return [optimizer.full_parameter(param) for param in net.parameters()], [g for g in grads if g is not None]


def train_half_all(param_dtype: torch.dtype) -> list[list[tuple[list[Tensor], list[Tensor]]]]:
    tiers: list[dict[str, Any]] = [{"fused": False}, {"fused": True}]
    if param_dtype is torch.bfloat16:
        tiers.append({"master_weights": "remainder"})
    return [
        [
            train_half(param_dtype, {"stage": stage, **tier}, how)
            for stage in (1, 2)
            for how in ("by hand", "step", "unscale")
        ]
        for tier in tiers
    ]


@pytest.mark.parametrize("param_dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_parameters(run_on_ranks: RunOnRanks, param_dtype: torch.dtype) -> None:
    """A power of two as scale leaves float32 sums what they are, and it does not matter who multiplies by it."""
    for by_tier in run_on_ranks(2, train_half_all, param_dtype):
        for runs in by_tier:
            params, grads = runs[0]
            assert params[0].dtype == grads[0].dtype == torch.float32 and len(grads) == len(params)
            for other_params, other_grads in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))
                assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def train_half_in_stage_0(param_dtype: torch.dtype) -> tuple[list[list[Tensor]], list[str]]:
    """In stage 0, 16-bit gradients are unscaled by the step, in float32: a huge scale flushes none of them to zero."""
    runs = []
    for fused in (True, False):
        options = {"stage": 0, "fused": fused}
        runs += [train_half(param_dtype, options, "step", scale)[0] for scale in (2.0**12, 2.0**14)]
    messages = []
    for how in ("unscale", "step"):
        try:
            train_half(param_dtype, {"stage": 0}, how)
            messages.append("works")
        except ValueError as error:
            messages.append(str(error))
    return runs, messages


@pytest.mark.parametrize("param_dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_in_stage_0(run_on_ranks: RunOnRanks, param_dtype: torch.dtype) -> None:
    for runs, messages in run_on_ranks(2, train_half_in_stage_0, param_dtype):
        for other in runs[1:]:
            check_close(runs[0], other)
        refused = "Attempting to unscale FP16 gradients." if param_dtype is torch.float16 else "works"
        assert messages == [refused, "works"]


# Skipped steps.


def skip(stage: int, optimizer_name: str) -> dict[str, Any]:
    net = build("mlp")
    inner = optimizer_for(optimizer_name, net)
    model, optimizer = zeroopt.wrap(net, inner, stage=stage, max_grad_norm=0.5, bucket_mb=0.002)
    scaler = GradScaler("cpu", init_scale=64.0)
    result: dict[str, Any] = {}
    for step in range(3):
        loss = scaler.scale(loss_of(model(batch("mlp", step))))
        (loss * INF if step == 1 and dist.get_rank() == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if dist.get_rank() == 0:  # after a step that clips, or was to, one rank may look alone
            result.setdefault("norms", []).append(optimizer.grad_norm.item())
        result.setdefault("values", []).append(snapshot(net))
        optimizer.zero_grad()
    counts = [entry["step"] for entry in optimizer.state_dict()["state"].values() if "step" in entry]
    return {**result, "steps": {float(count) for count in counts}, "calls": getattr(inner, "calls", None)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_leaves_everything_as_it_is(run_on_ranks: RunOnRanks, stage: int) -> None:
    for optimizer_name in ("adamw", "own"):
        ranks = run_on_ranks(2, skip, stage, optimizer_name)
        for result in ranks:
            first, second, third = result["values"]
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))
            assert result["steps"] == ({2.0} if optimizer_name == "adamw" else set())
            assert result["calls"] == (None if optimizer_name == "adamw" else 2)
        before, skipped, after = ranks[0]["norms"]
        assert 0 < before < 10 and skipped == INF and 0 < after < 10


# Who watches whether a step was taken.


class WatchedOptimizer:
    """Steps through a scaler and looks whether that has called `step()`, as Accelerate does."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.was_skipped = False

    def step(self) -> None:
        with patch.object(self.optimizer, "step", wraps=self.optimizer.step) as spy:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.was_skipped = not spy.called


Report = tuple[list[bool], list[float], list[float], list[Tensor]]


def train_watched(options: dict[str, Any] | None, unscale: bool) -> Report:
    """A scheduler steps when the optimizer has. Lightning clips where an optimizer leaves unscaling to the scaler."""
    net = build("mlp")
    model, optimizer = prepare(net, optimizer_for("adamw", net), options)
    scaler = GradScaler("cpu", init_scale=256.0)
    watched = WatchedOptimizer(optimizer, scaler)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    skipped, rates, scales = [], [], []
    for step in range(STEPS):
        spoil(net, step, float("nan") if step == 4 else INF)
        scaler.scale(loss_of(model(batch("mlp", step)).float())).backward()
        while handles:
            handles.pop().remove()
        if unscale:
            assert not getattr(optimizer, "_step_supports_amp_scaling", False)
            scaler.unscale_(optimizer)
            clip_grad_norm_(net.parameters(), 0.1)
        watched.step()
        if not watched.was_skipped:
            scheduler.step()
        optimizer.zero_grad()
        skipped.append(watched.was_skipped)
        rates.append(optimizer.param_groups[0]["lr"])
        scales.append(scaler.get_scale())
    return skipped, rates, scales, snapshot(net)


def train_watched_all() -> list[list[Report]]:
    variants: list[dict[str, Any] | None] = [None, *ZERO[:2], {"stage": 2, "check_every": 1, "max_grad_norm": 100.0}]
    return [[train_watched(options, unscale) for options in variants] for unscale in (False, True)]


def test_skipped_steps_are_seen_as_under_ddp(run_on_ranks: RunOnRanks) -> None:
    ranks = run_on_ranks(2, train_watched_all)
    for by_unscale in ranks:
        for (skipped, rates, scales, expected), *others in by_unscale:
            assert skipped == [step in (2, 4) for step in range(STEPS)]
            for report in others:
                assert report[:3] == (skipped, rates, scales)
                check_close(expected, report[3])


def train_half_watched() -> list[list[bool]]:
    tiers = ((torch.float16, 0), (torch.float16, 2), (torch.bfloat16, 0))
    return [
        train_watched({"stage": stage, "param_dtype": dtype, "cast_inputs": True}, unscale=False)[0]
        for dtype, stage in tiers
    ]


def test_skipped_steps_of_sixteen_bits_are_seen(run_on_ranks: RunOnRanks) -> None:
    """Also where gradients are of float16, which a scaler does not unscale."""
    for by_tier in run_on_ranks(2, train_half_watched):
        assert by_tier == [[step in (2, 4) for step in range(STEPS)]] * 3


def unscale_alone(stage: int) -> list[float]:
    """`unscale_` without the scaler's step: what one rank has found, all scalers go by."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), stage=stage, bucket_mb=0.002)
    scaler = GradScaler("cpu", init_scale=64.0)
    scales = []
    for step in range(STEPS):
        spoil(net, step)
        scaler.scale(loss_of(model(batch("mlp", step)))).backward()
        while handles:
            handles.pop().remove()
        scaler.unscale_(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("stage", STAGES)
def test_unscaling_is_agreed_at_once(run_on_ranks: RunOnRanks, stage: int) -> None:
    assert run_on_ranks(2, unscale_alone, stage) == [[64.0, 64.0, 32.0, 32.0, 16.0, 16.0, 16.0]] * 2


def average_with_a_scaler(inner: bool) -> tuple[list[bool], list[Tensor]]:
    """Ranks that train alone skip alone, and average with the others nevertheless."""
    net = build("mlp")
    groups = [dist.new_group([2 * pair, 2 * pair + 1]) for pair in range(2)]
    across = [dist.new_group([rank, rank + 2]) for rank in range(2)]
    within = {"process_group": groups[dist.get_rank() // 2], "average_group": across[dist.get_rank() % 2]}
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), average_every=2, **(within if inner else {}))
    scaler = GradScaler("cpu", init_scale=64.0)
    kept = []
    for step in range(4):
        before = snapshot(net)
        loss = scaler.scale(loss_of(model(batch("mlp", step))))
        (loss * INF if (step, dist.get_rank()) in ((2, 3), (3, 0)) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        kept.append(all(torch.equal(a, b) for a, b in zip(before, snapshot(net), strict=True)))
    return kept, snapshot(net)


@pytest.mark.parametrize("inner", [False, True])
def test_averaging_goes_on_where_a_rank_skips(run_on_ranks: RunOnRanks, inner: bool) -> None:
    ranks = run_on_ranks(4, average_with_a_scaler, inner)
    skips = [False, False, inner, True]  # step 2 by rank; in step 3 all average
    for (kept, values), skip in zip(ranks, skips, strict=True):
        assert kept == [False, False, skip, False]
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][1], values, strict=True))


def join_with_a_scaler(options: dict[str, Any] | None, rank_steps: list[int]) -> tuple[list[float], list[Tensor]]:
    """Ranks run out of data; one that still trains overflows after that."""
    net = build("mlp")
    model, optimizer = prepare(net, optimizer_for("adamw", net), options)
    scaler = GradScaler("cpu", init_scale=256.0)
    scales = []
    with model.join():  # type: ignore[operator]
        for step in range(rank_steps[dist.get_rank()]):
            scaler.scale(loss_of(model(batch("mlp", step)).float()) * (INF if step == 2 else 1.0)).backward()
            if options is None or "param_dtype" not in options:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
    return scales, snapshot(net)


def join_with_a_scaler_all(rank_steps: list[int]) -> list[tuple[list[float], list[Tensor]]]:
    half = {"stage": 0, "param_dtype": torch.float16, "cast_inputs": True}
    return [join_with_a_scaler(options, rank_steps) for options in (None, *ZERO[:3], half)]


def test_ranks_that_have_left_skip_with_the_others(run_on_ranks: RunOnRanks) -> None:
    ranks = run_on_ranks(3, join_with_a_scaler_all, [4, 1, 4])
    (scales, expected), *_ = ranks[0]
    assert scales == [256.0, 256.0, 128.0, 128.0]
    for rank, by_variant in enumerate(ranks):
        for other_scales, values in by_variant[1:]:
            assert other_scales == scales[: 1 if rank == 1 else 4]
        for _, values in by_variant[1:-1]:
            check_close(expected, values)
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][-1][1], by_variant[-1][1], strict=True))


def overflow_in_another_part(stage: int) -> tuple[list[bool], list[float]]:
    """Two pipeline stages of two ranks each. One rank of one stage overflows."""
    groups = [dist.new_group([2 * part, 2 * part + 1]) for part in range(2)]
    norms = [dist.new_group([rank, rank + 2]) for rank in range(2)]
    net = build("mlp")
    model, optimizer = zeroopt.wrap(
        net,
        optimizer_for("sgd", net),
        stage=stage,
        process_group=groups[dist.get_rank() // 2],
        norm_group=norms[dist.get_rank() % 2],
    )
    scaler = GradScaler("cpu", init_scale=64.0)
    watched, skipped, scales = WatchedOptimizer(optimizer, scaler), [], []
    for step in range(3):
        loss = scaler.scale(loss_of(model(batch("mlp", step))))
        (loss * INF if step == 1 and dist.get_rank() == 3 else loss).backward()
        watched.step()
        optimizer.zero_grad()
        skipped.append(watched.was_skipped)
        scales.append(scaler.get_scale())
    return skipped, scales


@pytest.mark.parametrize("stage", [0, 2])
def test_all_parts_of_a_model_skip_together(run_on_ranks: RunOnRanks, stage: int) -> None:
    assert run_on_ranks(4, overflow_in_another_part, stage) == [([False, True, False], [64.0, 32.0, 32.0])] * 4


# Ranks that run no backward.


def reference_with_absences(absent: dict[int, int], world_size: int, max_norm: float | None) -> list[Tensor]:
    """Absent ranks count with gradients of zero in the mean. By step: who is."""
    net = build("mlp")
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    for step in range(4):
        total = [torch.zeros_like(param) for param in net.parameters()]
        for rank in range(world_size):
            if absent.get(step) != rank:
                net.zero_grad()
                loss_of(net(type(net).inputs(torch.Generator().manual_seed(1000 * step + rank)))).backward()
                for one, param in zip(total, net.parameters(), strict=True):
                    one += param.grad  # type: ignore[arg-type]
        for one, param in zip(total, net.parameters(), strict=True):
            param.grad = one / world_size
        if max_norm is not None:
            clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
    return snapshot(net)


def train_with_absences(
    options: dict[str, Any], absent: dict[int, int], how: str, scaler: GradScaler | None
) -> list[Tensor]:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, OPTIMIZERS["adamw"](net.parameters()), **options)
    for step in range(4):
        if how == "overflow" and scaler is not None:  # in a step before, which all skip
            scaler.scale(loss_of(model(batch("mlp", step))) * INF).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        here = absent.get(step) != dist.get_rank()
        if here:
            loss = loss_of(model(batch("mlp", step)))
            (loss if scaler is None else scaler.scale(loss)).backward()
        if how == "clip":
            optimizer.clip_grad_norm_(0.2)
        if how == "look":
            norm = optimizer.grad_norm
            assert all(grad is not None for grad in map(optimizer.full_grad, net.parameters())) and norm > 0
        if scaler is None:
            optimizer.step()
        else:
            if here and how == "unscale":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        if how == "look":
            optimizer.zero_grad()
            assert optimizer.full_grad(net.scale) is None and optimizer.grad_norm == 0
        optimizer.zero_grad(set_to_none=how != "zeros")
    return snapshot(net)


def train_with_absences_all() -> tuple[list[Tensor], list[list[Tensor]], list[Tensor], list[list[Tensor]]]:
    """Never in step 0, where scalers are made. Whoever is absent owns its slices of everything as ever."""
    world_size = dist.get_world_size()
    absent = {1: 1, 2: 0, 3: world_size - 1}
    unclipped, clipped = [], []
    for options in ZERO:
        for how in ("plain", "zeros", "look"):
            unclipped.append(train_with_absences(options, absent, how, None))
        for how in ("plain", "zeros", "unscale"):
            scaler = GradScaler("cpu", init_scale=1000.0, growth_interval=2)
            unclipped.append(train_with_absences(options, absent, how, scaler))
            scaler = GradScaler("cpu", init_scale=1000.0, growth_interval=2)
            clipped.append(train_with_absences({**options, "max_grad_norm": 0.2}, absent, how, scaler))
        clipped.append(train_with_absences(options, absent, "clip", None))
    for options in ZERO[::2]:
        scaler = GradScaler("cpu", init_scale=1000.0, growth_interval=2)
        unclipped.append(train_with_absences(options, absent, "overflow", scaler))
    return (
        reference_with_absences(absent, world_size, None),
        unclipped,
        reference_with_absences(absent, world_size, 0.2),
        clipped,
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_without_a_backward(run_on_ranks: RunOnRanks, world_size: int) -> None:
    for unclipped, runs, clipped, clipped_runs in run_on_ranks(world_size, train_with_absences_all):
        for values in runs:
            check_close(unclipped, values)
        for values in clipped_runs:
            check_close(clipped, values)


# Mistakes, and what surrounds a step.


def go_wrong(how: str, stage: int) -> list[str]:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), stage=stage, bucket_mb=0.002)
    scaler = GradScaler("cpu", init_scale=2.0 ** (10 + (dist.get_rank() if "scales" in how else 0)))
    scaler.scale(torch.zeros(()))
    scaler.scale(loss_of(model(batch("mlp", 0)))).backward()
    messages: list[str] = []

    def note(call: Any) -> None:
        try:
            call()
            messages.append("fine")
        except (RuntimeError, AssertionError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    if how == "unscaled scales":
        note(lambda: scaler.unscale_(optimizer))
    if how == "order":
        for call in (scaler.unscale_, scaler.unscale_, scaler.step, scaler.step, scaler.unscale_):
            note(lambda call=call: call(optimizer))
        note(lambda: scaler.step(optimizer, closure=lambda: 0.0))
        note(scaler.update)
    else:
        note(lambda: scaler.step(optimizer))
    return messages


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_mistakes_are_named_on_all_ranks(run_on_ranks: RunOnRanks, world_size: int, stage: int) -> None:
    scales = ", ".join(("1024", "2048", "4096")[:world_size])
    different = f"StateError: the ranks multiply their losses by different scales ({scales}): make the GradScaler alike"
    for (message,) in run_on_ranks(world_size, go_wrong, "scales", stage):
        assert message.startswith(different), message
    for unscale, step in run_on_ranks(world_size, go_wrong, "unscaled scales", stage):
        # In stage 0 it is torch that unscales, and says nothing to anybody.
        assert unscale == "fine" if stage == 0 else unscale.startswith(different), unscale
        assert step.startswith(different), step
    for messages in run_on_ranks(world_size, go_wrong, "order", stage):
        assert messages == [
            "fine",
            "RuntimeError: unscale_() has already been called on this optimizer since the last update().",
            "fine",
            "RuntimeError: step() has already been called since the last update().",
            "RuntimeError: unscale_() is being called after step().",
            "RuntimeError: Closure use is not currently supported if GradScaler is enabled.",
            "fine",
        ]


def step_without_gradients(stage: int) -> str:
    net = build("mlp")
    _, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), stage=stage)
    scaler = GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(zeroopt.StateError) as error:
        scaler.step(optimizer)
    return str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_without_any_gradients_is_named(run_on_ranks: RunOnRanks, stage: int) -> None:
    for message in run_on_ranks(2, step_without_gradients, stage):
        assert message.startswith("a GradScaler found no gradients on some rank")


def unscale_without_gradients(stage: int) -> str:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), stage=stage)
    scaler = GradScaler("cpu")
    loss = scaler.scale(loss_of(model(batch("mlp", 0))))
    if dist.get_rank() == 1:
        scaler.unscale_(optimizer)
    else:
        loss.backward()
    try:
        scaler.step(optimizer)
    except zeroopt.StateError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", STAGES)
def test_unscaling_without_gradients_is_named_on_all_ranks(run_on_ranks: RunOnRanks, stage: int) -> None:
    """torch's scaler would assert on that rank alone, after the step."""
    for message in run_on_ranks(2, unscale_without_gradients, stage):
        assert message.startswith("a GradScaler found no gradients on some rank")


def mix_with_plain_steps(options: dict[str, Any] | None) -> tuple[list[float], list[Tensor]]:
    """Steps with a scaler, unscaled by it and stepped without it, without one, and with one that is off; its state is
    saved and loaded on the way."""
    net = build("mlp")
    model, optimizer = prepare(net, optimizer_for("adamw", net), options)
    scaler = GradScaler("cpu", init_scale=512.0, growth_interval=1)
    off = GradScaler("cpu", enabled=False)
    scales = []
    for step in range(8):
        loss = loss_of(model(batch("mlp", step)))
        if step % 4 == 0:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        elif step % 4 == 1:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            optimizer.step()
            scaler.update()
        elif step % 4 == 2:
            off.scale(loss).backward()
            off.unscale_(optimizer)
            off.step(optimizer)
            off.update()
        else:
            loss.backward()
            optimizer.step()
            state = scaler.state_dict()
            scaler = GradScaler("cpu", growth_interval=1)
            scaler.load_state_dict(state)
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
    return scales, snapshot(net)


def mix_all() -> list[tuple[list[float], list[Tensor]]]:
    return [mix_with_plain_steps(options) for options in (None, *ZERO)]


def test_steps_with_and_without_a_scaler(run_on_ranks: RunOnRanks) -> None:
    for (scales, expected), *others in run_on_ranks(2, mix_all):
        assert scales[-1] == 512.0 * 2**4
        for other_scales, values in others:
            assert other_scales == scales
            check_close(expected, values)


def gradients_after_a_step(options: dict[str, Any] | None) -> list[list[Tensor]]:
    """What may still be logged, and added to: gradients that are scaled back, and clipped."""
    net = build("mlp")
    model, optimizer = prepare(net, optimizer_for("sgd", net), options)
    scaler = GradScaler("cpu", init_scale=1000.0)
    seen = []
    for step in range(2):
        scaler.scale(loss_of(model(batch("mlp", step)))).backward()
        if options is None or options["stage"] > 0:  # else max_grad_norm does
            scaler.unscale_(optimizer)
            clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if isinstance(optimizer, zeroopt.ZeroOptimizer):
            grads = [optimizer.full_grad(param) for param in net.parameters()]
        else:
            grads = [param.grad for param in net.parameters()]
        seen.append([grad.clone() for grad in grads if grad is not None])
    return [*seen, snapshot(net)]


def gradients_after_a_step_all() -> list[list[list[Tensor]]]:
    variants = [{**ZERO[0], "max_grad_norm": 0.1}, {**ZERO[0], "max_grad_norm": 0.1, "fused": False}, *ZERO[1:]]
    return [gradients_after_a_step(options) for options in (None, *variants)]


def test_gradients_after_a_step(run_on_ranks: RunOnRanks) -> None:
    for expected, *others in run_on_ranks(2, gradients_after_a_step_all):
        for seen in others:
            for want, got in zip(expected, seen, strict=True):
                check_close(want, got)


def step_by_a_scaler_of_another_class(options: dict[str, Any], found: float) -> tuple[bool, bool]:
    """A step with `found_inf` and `grad_scale`, as torch's fused optimizers take them, from whoever sets them: whether it was taken,
    and whether it then came to where a loss that was not multiplied comes to."""
    results = []
    for scale in (4.0, 1.0):
        net = build("mlp")
        model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), **options)
        before = snapshot(net)
        (scale * loss_of(model(batch("mlp", 0)))).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        results.append(snapshot(net))
    scaled, plain = results
    taken = any(not torch.equal(one, other) for one, other in zip(before, scaled, strict=True))
    return taken, all(torch.equal(one, other) for one, other in zip(scaled, plain, strict=True))


@pytest.mark.parametrize("options", ZERO, ids=str)
def test_scalers_of_other_classes_are_heard(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    assert run_on_ranks(2, step_by_a_scaler_of_another_class, options, 0.0) == [(True, True)] * 2
    assert run_on_ranks(2, step_by_a_scaler_of_another_class, options, 1.0) == [(False, True)] * 2
