"""Clipping and norms give what DistributedDataParallel and torch.nn.utils.clip_grad_norm_ give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from training import MODELS, batch, build, loss_of, optimizer_for, prepare, snapshot
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.options.precision import round_master
from zeroopt.state.shard_tensor import ShardTensor

BF16, FP16, INF = torch.bfloat16, torch.float16, float("inf")
STAGES = (0, 1, 2)
TIERS: list[dict[str, Any]] = [
    {"state_dtype": torch.int8},
    {"param_dtype": BF16},
    {"param_dtype": BF16, "fused": False},
    {"param_dtype": FP16},
    {"param_dtype": BF16, "master_weights": "remainder"},
    {"param_dtype": BF16, "master_weights": "remainder", "state_dtype": torch.int8},
    {"param_dtype": BF16, "master_weights": "none", "state_dtype": BF16},
    {"param_dtype": BF16, "reduce_dtype": torch.float32},
]
MAX_NORM = 0.05


def train_clipped(
    options: dict[str, Any] | None, max_norm: float = MAX_NORM, norm_type: float = 2.0, micro_batches: int = 2
) -> tuple[list[float], list[Tensor]]:
    """Norms found in each step, and the parameters at the end. With `max_grad_norm`, the step clips."""
    net = build("lm")
    # Plain SGD: what clipping does to a gradient shows in the parameters as it is.
    model, optimizer = prepare(net, optimizer_for("sgd", net), options)
    norms = []
    for step in range(3):
        for micro in range(micro_batches):
            loss_of(model(batch("lm", 10 * step + micro)).float()).backward()
        if options is None:
            norm = clip_grad_norm_(net.parameters(), max_norm, norm_type)
            optimizer.step()
        else:
            assert isinstance(optimizer, zeroopt.ZeroOptimizer)
            if "max_grad_norm" in options:
                optimizer.step()
                norm = optimizer.grad_norm
            else:
                norm = optimizer.clip_grad_norm_(max_norm, norm_type)
                optimizer.step()
            assert norm.shape == () and norm.dtype == torch.float32
        norms.append(norm.item())
        optimizer.zero_grad()
    return norms, snapshot(net)


def check_close(expected: list[Tensor], values: list[Tensor]) -> None:
    for want, got in zip(expected, values, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def clip_all(max_norm: float) -> list[list[tuple[list[float], list[Tensor]]]]:
    """By p; DDP first."""
    variants = [None, *({"stage": stage, "bucket_mb": 0.002} for stage in STAGES)]
    return [[train_clipped(options, max_norm, p) for options in variants] for p in (1.0, 2.0, 3.0, INF)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_norm", [MAX_NORM, 1e6])
def test_clipping_follows_ddp(run_on_ranks: RunOnRanks, world_size: int, max_norm: float) -> None:
    ranks = run_on_ranks(world_size, clip_all, max_norm)
    for by_p in ranks:
        for (expected_norms, expected), *others in by_p:
            for norms, values in others:
                assert norms == pytest.approx(expected_norms, rel=1e-5)
                check_close(expected, values)
        assert [[norms for norms, _ in runs] for runs in by_p] == [[norms for norms, _ in runs] for runs in ranks[0]]


def clip_in_the_step() -> list[tuple[list[float], list[Tensor]]]:
    options = [
        {"stage": stage, "fused": fused, "bucket_mb": bucket_mb, "max_grad_norm": MAX_NORM}
        for stage in STAGES
        for fused, bucket_mb in ((True, 0.002), (False, 25.0))
    ]
    return [train_clipped(None), *(train_clipped(one) for one in options)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_max_grad_norm_follows_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    for (expected_norms, expected), *others in run_on_ranks(world_size, clip_in_the_step):
        for norms, values in others:
            assert norms == pytest.approx(expected_norms, rel=1e-5)
            check_close(expected, values)


def clip_tiers() -> list[list[list[tuple[list[float], list[Tensor]]]]]:
    """By tier and stage: clipped by a call, by the step, by a step that has nothing to clip, and not at all."""
    results = []
    for tier in TIERS:
        stages = (1, 2) if "reduce_dtype" in tier else STAGES
        by_stage = []
        for stage in stages:
            options = {"stage": stage, "bucket_mb": 0.004, **tier}
            torch.manual_seed(99)  # of stochastic rounding
            by_stage.append(
                [
                    train_clipped(options),
                    train_clipped({**options, "max_grad_norm": MAX_NORM}),
                    train_clipped({**options, "max_grad_norm": 1e6}),
                    train_clipped(options, 1e6),
                ]
            )
        results.append(by_stage)
    return results


def test_max_grad_norm_in_every_tier(run_on_ranks: RunOnRanks) -> None:
    for by_tier in run_on_ranks(2, clip_tiers):
        for tier, by_stage in zip(TIERS, by_tier, strict=True):
            *in_stage_0, (call, step, *_), other = by_stage
            for (call_norms, called), (step_norms, stepped), unclipped, free in by_stage:
                assert call_norms[0] == step_norms[0] > MAX_NORM
                assert unclipped[0] == free[0]
                assert all(torch.equal(a, b) for a, b in zip(unclipped[1], free[1], strict=True)), tier
                assert not all(torch.equal(a, b) for a, b in zip(stepped, unclipped[1], strict=True)), tier
            # In stages 1 and 2 clipping is the same multiplication, in float32, whoever asks for it. In stage 0 a call
            # rounds 16-bit gradients.
            for one, another in ((call, step), *zip((call, step), other[:2], strict=True)):
                assert one[0] == another[0], tier
                assert all(torch.equal(a, b) for a, b in zip(one[1], another[1], strict=True)), tier
            for (_, called), (_, stepped), *_ in in_stage_0:
                for a, b in zip(called, stepped, strict=True):
                    torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-12, msg=f"{tier}")


def clip_after(what: str) -> float:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net))
    if what == "zero_grad":
        loss_of(model(batch("mlp", 0))).backward()
        optimizer.zero_grad()
    elif what == "no_sync":
        with model.no_sync():
            loss_of(model(batch("mlp", 0))).backward()
    elif what == "nan" and dist.get_rank() == 0:
        (loss_of(model(batch("mlp", 0))) * float("nan")).backward()
    elif what == "nan":
        loss_of(model(batch("mlp", 0))).backward()
    return optimizer.clip_grad_norm_(1.0, -1.0 if what == "norm_type" else 2.0).item()


def test_nothing_to_clip(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, clip_after, "nothing") == [0.0, 0.0]
    assert run_on_ranks(2, clip_after, "zero_grad") == [0.0, 0.0]


def test_a_nan_on_one_rank_is_seen_by_all(run_on_ranks: RunOnRanks) -> None:
    assert all(math.isnan(norm) for norm in run_on_ranks(2, clip_after, "nan"))


def test_refusals(run_on_ranks: RunOnRanks) -> None:
    for error in run_on_ranks.outcomes(2, clip_after, "no_sync"):
        assert error.type_name == "StateError" and "no_sync" in error.message
    for error in run_on_ranks.outcomes(2, clip_after, "norm_type"):
        assert error == ("ConfigError", "expected norm_type to be positive or inf, got -1.0")


# Gradients that a user has cleared or set.


def clip_edited(options: dict[str, Any] | None) -> tuple[list[float], list[Tensor]]:
    net = build("mlp")
    model, optimizer = prepare(net, optimizer_for("sgd_momentum", net), options)
    params, norms = list(net.parameters()), []
    for step in range(3):
        if step != 1:  # in step 1 there are no gradients but those that are set
            loss_of(model(batch("mlp", step))).backward()
            params[2].grad = None
        params[1].grad = torch.full_like(params[1], 0.1)
        params[4].grad = torch.full_like(params[4], -0.1)
        for max_norm in (0.2, 0.1):
            if isinstance(optimizer, zeroopt.ZeroOptimizer):
                norms.append(optimizer.clip_grad_norm_(max_norm).item())
            else:
                norms.append(clip_grad_norm_(params, max_norm).item())
        norms += [param.grad.norm().item() for param in params if param.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return norms, snapshot(net)


def clip_edited_all() -> list[tuple[list[float], list[Tensor]]]:
    variants = [None, *({"stage": stage, "bucket_mb": mb} for stage in STAGES for mb in (0.002, 25.0))]
    return [clip_edited(options) for options in variants]


@pytest.mark.parametrize("world_size", [2, 3])
def test_clipping_what_the_user_has_set(run_on_ranks: RunOnRanks, world_size: int) -> None:
    for (expected_norms, expected), *others in run_on_ranks(world_size, clip_edited_all):
        for norms, values in others:
            assert norms == pytest.approx(expected_norms, rel=1e-5)
            check_close(expected, values)


# Looking at gradients.


def norm_of(grads: list[Tensor | None]) -> float:
    return torch.stack([grad.double().norm() for grad in grads if grad is not None]).norm().item()


def look_at_norms(stage: int, options: dict[str, Any]) -> None:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), stage=stage, bucket_mb=0.002, **options)

    def norm() -> float:
        return norm_of([optimizer.full_grad(param) for param in net.parameters()])

    def look(expected: float) -> None:
        assert [optimizer.grad_norm.item() for _ in range(2)] == [pytest.approx(expected, rel=1e-5)] * 2

    look(0.0)
    loss_of(model(batch("mlp", 0))).backward()
    first = norm()
    look(first)
    loss_of(model(batch("mlp", 1))).backward()  # accumulates
    second = norm()
    assert second > 1.1 * first
    look(second)
    optimizer.step()
    look(second)
    optimizer.zero_grad()
    if not options:  # one that was clipped by is kept for the log
        look(0.0)
    loss_of(model(batch("mlp", 1))).backward()
    third = norm()
    for norm_type in (1.0, INF, 3.0):  # leave the 2-norm of what they have left
        optimizer.clip_grad_norm_(1e3, norm_type)
        look(third)
    assert optimizer.clip_grad_norm_(0.25 * third, 1.0) > third
    clipped = norm()
    assert clipped < 0.3 * third
    look(clipped)
    net.layers[0].weight.grad.mul_(3.0)  # type: ignore[union-attr]
    look(norm())
    net.zero_grad()
    look(0.0)
    loss_of(model(batch("mlp", 1))).backward()
    assert optimizer.clip_grad_norm_(0.5 * third).item() == pytest.approx(third, rel=1e-5)
    assert norm() == pytest.approx(0.5 * third, rel=1e-5)
    if dist.get_rank() == 0:  # is there: it is the norm before clipping
        look(third)
    for p in (2.0, INF):
        grads = [optimizer.full_grad(param) for param in net.parameters()]
        for param, grad in zip(net.parameters(), grads, strict=True):
            torch.testing.assert_close(param.grad.norm(p), grad.norm(p))  # type: ignore[union-attr]
        optimizer.clip_grad_norm_(0.1 * third)


def look_at_norms_all() -> bool:
    for stage in STAGES:
        for options in ({}, {"fused": False}, {"max_grad_norm": 1e3}):
            look_at_norms(stage, options)
    return True


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_grad_norm(run_on_ranks: RunOnRanks, world_size: int) -> None:
    assert all(run_on_ranks(world_size, look_at_norms_all))


class SometimesUsed(nn.Module):
    """Rank 0 uses one part, the others use another, and nobody the third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[min(dist.get_rank(), 1)](x)


def gather_gradients(world_size: int) -> None:
    """Gradients as whole tensors, of models with memory formats, 0-dim parameters and unused ones."""
    for stage in STAGES:
        for bucket_mb in (25.0, 0.002):
            for name in (*MODELS, "sometimes"):
                pair = [SometimesUsed() if name == "sometimes" else build(name) for _ in range(2)]
                optimizer: torch.optim.Optimizer = optimizer_for("sgd", pair[0])
                model, optimizer = zeroopt.wrap(pair[0], optimizer, stage=stage, bucket_mb=bucket_mb)
                ddp = DistributedDataParallel(pair[1], find_unused_parameters=True)
                for step in range(2):
                    for trained in (model, ddp):
                        loss_of(trained(batch("mlp" if name == "sometimes" else name, step))).backward()
                    for param, reference in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
                        if not param.requires_grad:
                            continue
                        grad = optimizer.full_grad(param)
                        if reference.grad is None:
                            assert grad is None and param.grad is None
                            continue
                        assert type(grad) is Tensor and grad.stride() == param.stride()
                        if world_size == 2 and step == 0:
                            assert torch.equal(grad, reference.grad)
                        torch.testing.assert_close(grad, reference.grad, rtol=1e-4, atol=1e-7)
                        grad.zero_()  # a copy
                        again = optimizer.full_grad(param)
                        assert again is not None and bool(again.any()) == bool(reference.grad.any())


@pytest.mark.parametrize("world_size", [2, 3])
def test_full_grad_is_ddps_gradient(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, gather_gradients, world_size)


def gather_parameters(stage: int, options: dict[str, Any]) -> list[list[Tensor]]:
    """Full parameters after wrapping, after each step, and after writing into some."""
    net = build("lm")
    before = [param.detach().clone() for param in net.parameters()]
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=stage, bucket_mb=0.004, **options)

    def gather() -> list[Tensor]:
        full = [optimizer.full_parameter(param) for param in net.parameters()]
        for whole, param in zip(full, net.parameters(), strict=True):
            assert type(whole) is Tensor and whole.shape == param.shape and not whole.requires_grad
            assert torch.equal(round_master(whole, param.dtype) if whole.dtype != param.dtype else whole, param)
            if whole.dtype == param.dtype:
                assert whole.data_ptr() != param.data_ptr()
        return full

    history = [gather()]
    if options.get("master_weights") != "none":
        assert all(torch.equal(a, b) for a, b in zip(before, history[0], strict=True))
    for step in range(3):
        loss_of(model(batch("lm", step)).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(gather())
    saved = optimizer.state_dict()
    for i, whole in enumerate(history[-1]):  # what this rank saves of a float32 master is a piece of it
        entry = saved["state"].get(i, {})
        if "master_param" in entry:
            piece = entry["master_param"]
            first, last = (piece.start, piece.stop) if isinstance(piece, ShardTensor) else (0, whole.numel())
            assert torch.equal(whole.view(-1)[first:last], getattr(piece, "local", piece).view(-1))
    with torch.no_grad():
        net.embed.weight.fill_(0.3)
    history.append(gather())
    return history


def gather_parameters_all() -> list[list[list[Tensor]]]:
    master = {"param_dtype": BF16}
    runs = [gather_parameters(stage, {**master, "fused": True}) for stage in (1, 2)]
    runs.append(gather_parameters(2, {**master, "master_weights": "remainder"}))
    for stage in STAGES:
        gather_parameters(stage, {})
        gather_parameters(stage, {**master, "fused": False})
    gather_parameters(0, {**master, "master_weights": "remainder"})
    gather_parameters(1, {**master, "master_weights": "none"})
    gather_parameters(1, {"param_dtype": FP16})
    return runs


@pytest.mark.parametrize("world_size", [2, 3])
def test_full_parameter_is_the_master(run_on_ranks: RunOnRanks, world_size: int) -> None:
    ranks = run_on_ranks(world_size, gather_parameters_all)
    for runs in ranks:
        for history in runs:
            assert all(value.dtype == torch.float32 for value in history[1])
            for step in range(4):  # a remainder completes a parameter to what a float32 master would be
                assert all(torch.equal(a, b) for a, b in zip(history[step], ranks[0][0][step], strict=True))


def ask_for_foreign_tensors() -> list[str]:
    net = build("mlp")
    _, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net))
    messages = []
    for ask in (optimizer.full_grad, optimizer.full_parameter):
        for tensor in (torch.zeros(3), net.layers[0].weight.detach(), nn.Parameter(torch.zeros(2, 2))):
            try:
                ask(tensor)
            except zeroopt.ConfigError as error:
                messages.append(str(error))
    return messages


def test_foreign_tensors_are_refused(run_on_ranks: RunOnRanks) -> None:
    shapes = ([3], [33, 7], [2, 2])
    expected = [f"expected a parameter that this optimizer trains, got another tensor of shape {s}" for s in shapes]
    for messages in run_on_ranks(2, ask_for_foreign_tensors):
        assert messages == expected * 2
