"""`check_every`: healthy training goes on as without it; what is wrong is named, with its rank, on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from short_timeouts import lose_patience
from torch import Tensor, nn
from training import batch, build, loss_of, optimizer_for, snapshot
from transports import hosts
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.features import audit
from zeroopt.gradients.reducer import GradientReducer
from zeroopt.state.shard_tensor import ShardTensor

ODD_RANK = 1
ODD_PARAM = "layers.2.weight"
STAGES = (0, 1, 2)


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@given(st.binary(min_size=8, max_size=96), st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.float64]))
def test_digest_is_the_sum_it_claims_to_be_and_leaves_values_alone(chunk: int, data: bytes, dtype: torch.dtype) -> None:
    memory = bytearray(data[: len(data) // 8 * 8])
    values = torch.frombuffer(memory, dtype=dtype)
    size, expected = dtype.itemsize, 0
    for first in range(0, len(values), chunk):
        expected *= 0x9E3779B97F4A7C15
        for i in range(min(chunk, len(values) - first)):
            begin = (first + i) * size
            expected += int.from_bytes(data[begin : begin + size], "little", signed=True) * (2 * i + 1)
    with patch.object(audit, "_CHUNK_NUMEL", chunk):
        assert int(audit.digest(values)) % 2**64 == expected % 2**64
    assert memory == data[: len(memory)]


@given(st.integers(1, 300), st.data())
def test_digest_notices_one_element_and_an_exchange(numel: int, data: st.DataObject) -> None:
    values = torch.randn(numel)
    i, j = (data.draw(st.integers(0, numel - 1)) for _ in range(2))
    changed, exchanged = values.clone(), values.clone()
    changed.view(torch.int32)[i] ^= 1 << data.draw(st.integers(0, 30))
    exchanged[[i, j]] = values[[j, i]]
    with patch.object(audit, "_CHUNK_NUMEL", 64):
        assert int(audit.digest(changed)) != int(audit.digest(values))
        assert (int(audit.digest(exchanged)) == int(audit.digest(values))) == (i == j)


def train(options: dict[str, Any]) -> list[Tensor]:
    """Three steps over a batch each, the second with an accumulation."""
    options = dict(options)
    of_rank = options.pop("hosts", None)
    net = build("mlp")
    with hosts(of_rank) if of_rank else nullcontext():
        model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), bucket_mb=0.01, **options)
    dtype = options.get("param_dtype", torch.float32)
    for step in range(3):
        for micro in range(2 if step == 1 else 1):
            loss_of(model(batch("mlp", 10 * step + micro).to(dtype))).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


def train_with_and_without(variants: list[dict[str, Any]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    return [(train(options), train({**options, "check_every": 1 + i % 2})) for i, options in enumerate(variants)]


BF16 = {"param_dtype": torch.bfloat16}
HEALTHY: list[dict[str, Any]] = [
    *({"stage": stage, "transport": transport} for stage in STAGES for transport in ("shm", "pairwise", "torch")),
    *({"stage": stage, "fused": False} for stage in STAGES),
    *({"stage": stage, "overlap": False} for stage in STAGES),
    *({"stage": stage, **BF16} for stage in STAGES),
    {"stage": 1, "share_parameters": True},
    {"stage": 2, "share_parameters": True},
    {"stage": 2, "reduce_dtype": torch.bfloat16},
    {"stage": 2, "param_dtype": torch.float16},
    {"stage": 1, **BF16, "master_weights": "remainder"},
    {"stage": 2, **BF16, "master_weights": "remainder", "state_dtype": torch.int8},
    {"stage": 2, **BF16, "master_weights": "none", "state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_healthy_training_is_left_alone(run_on_ranks: RunOnRanks, world_size: int) -> None:
    variants = HEALTHY if world_size > 1 else [{"stage": stage} for stage in STAGES]
    for rank in run_on_ranks(world_size, train_with_and_without, variants):
        for without, with_checks in rank:
            assert all(torch.equal(a, b) for a, b in zip(without, with_checks, strict=True))


def test_healthy_training_on_two_hosts(run_on_ranks: RunOnRanks) -> None:
    variants = [{"stage": stage, "hosts": [0, 0, 1, 1], "share_parameters": stage == 2} for stage in STAGES]
    for rank in run_on_ranks(4, train_with_and_without, variants):
        for without, with_checks in rank:
            assert all(torch.equal(a, b) for a, b in zip(without, with_checks, strict=True))


def wrapped(**options: Any) -> tuple[nn.Module, Any, zeroopt.ZeroOptimizer]:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), bucket_mb=0.01, **options)
    return net, model, optimizer


def corrupt(net: nn.Module) -> None:
    """As a user does who looks for trouble; no version is counted."""
    if dist.get_rank() == ODD_RANK:
        net.get_parameter(ODD_PARAM).data[-1, -1] += 1


def step_corrupted(moment: str, options: dict[str, Any], num_steps: int) -> str:
    """A parameter changes on one rank alone; the error of the steps, or nothing."""
    net, model, optimizer = wrapped(**options)
    note_step = GradientReducer.note_step

    def note_and_corrupt(reducer: GradientReducer) -> None:
        if moment == "at the end of the step":
            corrupt(net)
        note_step(reducer)

    try:
        with patch.object(GradientReducer, "note_step", note_and_corrupt):
            for step in range(num_steps):
                if step == 0 and moment == "before forward":
                    corrupt(net)
                loss_of(model(batch("mlp", step))).backward()
                if step == 0 and moment == "before step":
                    corrupt(net)
                optimizer.step()
                optimizer.zero_grad()
    except zeroopt.RankMismatchError as error:
        return str(error)
    return "nothing"


def step_corrupted_in_all_stages(moment: str, options: dict[str, Any], num_steps: int) -> list[str]:
    return [step_corrupted(moment, {"stage": stage, **options}, num_steps) for stage in STAGES]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("moment", "when"),
    [("before forward", "before step 1"), ("before step", "before step 1"), ("at the end of the step", "after step 1")],
)
def test_a_parameter_that_differs_is_named(run_on_ranks: RunOnRanks, world_size: int, moment: str, when: str) -> None:
    ranks = run_on_ranks(world_size, step_corrupted_in_all_stages, moment, {"check_every": 1}, 1)
    assert ranks == [ranks[0]] * world_size
    for heard in ranks[0]:
        assert heard.startswith(
            f"{when}: parameter '{ODD_PARAM}' is not the same on all ranks: on rank 1 it differs from rank 0. "
        )


def test_only_steps_that_are_due_are_looked_at(run_on_ranks: RunOnRanks) -> None:
    (stage_0, *_), other = run_on_ranks(2, step_corrupted_in_all_stages, "before step", {"check_every": 2}, 2)
    assert stage_0 == other[0]
    assert stage_0.startswith(f"before step 2: parameter '{ODD_PARAM}'"), "in stage 0 nobody else writes it"
    for options in ({"check_every": 3}, {}):
        heard = run_on_ranks(2, step_corrupted_in_all_stages, "before step", options, 2)
        assert heard == [["nothing"] * 3] * 2


def diverge(transport: str, timeout_s: float) -> str:
    """In a training's last step, one rank runs a backward more (shm), or takes no step (messages)."""
    net = build("mlp")
    inner = optimizer_for("adamw", net)
    group = dist.new_group()
    model, optimizer = zeroopt.wrap(net, inner, 0, group, bucket_mb=0.01, transport=transport, check_every=1)
    loss_of(model(batch("mlp", 0))).backward()
    lose_patience(timeout_s)
    try:
        if dist.get_rank() == ODD_RANK and transport == "shm":
            loss_of(model(batch("mlp", 1))).backward()
        if dist.get_rank() != ODD_RANK or transport == "shm":
            optimizer.step()
    except zeroopt.CollectiveError as error:
        return str(error)
    return "nothing"


def test_ranks_that_diverge_are_noticed_before_a_checked_step(run_on_ranks: RunOnRanks) -> None:
    for heard, check in zip(
        run_on_ranks(2, diverge, "shm", 600.0),
        ["check before a step", "what this rank has not come to yet"],
        strict=True,
    ):
        assert f"rank 0 at the scalar of {check} (8 bytes); rank 1 at the reduce-scatter of bucket 0" in heard


def test_a_last_step_of_the_others_alone_is_noticed(run_on_ranks: RunOnRanks) -> None:
    """In stage 0 by messages, where a step exchanges nothing else."""
    first, second = run_on_ranks(2, diverge, "pairwise", 1.0)
    assert first.startswith("transport pairwise, gather of check before a step: failed for want of rank 1: ")
    assert second == "nothing"


def spoil(net: nn.Module, name: str, value: float) -> None:
    """Let one rank's next gradient of a parameter have an element of that value."""
    param = net.get_parameter(name)

    def change(grad: Tensor) -> Tensor:
        handle.remove()
        grad = grad.clone()
        grad.view(-1)[-1] = value
        return grad

    handle = param.register_hook(change)


def own(value: Tensor) -> Tensor:
    """What a rank has of a tensor in its state dict."""
    return value.local if isinstance(value, ShardTensor) else value


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Of two state dicts of an optimizer of this rank."""
    same = one["state"].keys() == other["state"].keys()
    return same and all(
        torch.equal(own(value), own(other["state"][index][name]))
        for index, entry in one["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    )


def step_spoilt(options: dict[str, Any], value: float, spoilt: list[str], in_backward: int, clip: bool) -> str:
    """In the second step one rank has gradients that are not finite, after one of three backward passes. The step is refused,
    and training goes on as if it had not been tried.

    Args:
        spoilt: parameters, by name.
    """
    net, model, optimizer = wrapped(check_every=1, **options)
    twin, twin_model, twin_optimizer = wrapped(**options)

    def train_both(number: int) -> None:
        for one, one_optimizer in ((model, optimizer), (twin_model, twin_optimizer)):
            loss_of(one(batch("mlp", number))).backward()
            one_optimizer.step()
            one_optimizer.zero_grad()

    train_both(0)
    before, state = snapshot(net), optimizer.state_dict()
    for number in range(3):
        if number == in_backward and dist.get_rank() == ODD_RANK:
            for name in spoilt:
                spoil(net, name, value)
        loss_of(model(batch("mlp", 1 + number))).backward()
    if clip:
        optimizer.clip_grad_norm_(1.0)
    try:
        optimizer.step()
        return "nothing"
    except zeroopt.NonFiniteError as error:
        heard = str(error)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(net), strict=True))
    assert same_state(state, optimizer.state_dict())
    optimizer.zero_grad()
    for number in (5, 6):
        train_both(number)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(net), snapshot(twin), strict=True))
    return heard


def step_spoilt_in_all_stages(options: dict[str, Any], *args: Any) -> list[str]:
    return [step_spoilt({"stage": stage, **options}, *args) for stage in STAGES]


@pytest.mark.parametrize(
    ("world_size", "options", "value", "in_backward", "clip"),
    [
        (2, {}, float("nan"), 2, False),
        (2, {"transport": "pairwise"}, float("inf"), 0, False),
        (3, {}, float("nan"), 0, True),
        (3, {"transport": "torch", "fused": False}, -float("inf"), 1, False),
    ],
)
def test_a_gradient_that_is_not_finite_is_named(
    run_on_ranks: RunOnRanks, world_size: int, options: dict[str, Any], value: float, in_backward: int, clip: bool
) -> None:
    """With its rank, also where the sum of later backward passes is not finite on any rank, and where clipping by a norm that is
    not finite has spoilt all gradients."""
    names = ["layers.4.bias", ODD_PARAM]
    ranks = run_on_ranks(world_size, step_spoilt_in_all_stages, options, value, names, in_backward, clip)
    assert ranks == [ranks[0]] * world_size
    for heard in ranks[0]:
        assert heard.startswith(
            f"before step 2: the gradient of parameter '{ODD_PARAM}' (and 1 more) has elements that are not finite; backward "
            "left it so on rank 1. Nothing has been changed"
        )


def overflow(stage: int) -> str:
    """Gradients that are finite on every rank in every backward, but not their sum."""
    net, model, optimizer = wrapped(stage=stage, check_every=1)
    for number in range(2):
        spoil(net, ODD_PARAM, 3e38)
        loss_of(model(batch("mlp", number))).backward()
    try:
        optimizer.step()
    except zeroopt.NonFiniteError as error:
        return str(error)
    return "nothing"


def test_sums_that_overflow_are_told_apart(run_on_ranks: RunOnRanks) -> None:
    for stage in (1, 2):
        for heard in run_on_ranks(2, overflow, stage):
            assert heard.startswith(
                f"before step 1: the gradient of parameter '{ODD_PARAM}' has elements that are not finite; "
            )
            assert "this step's backward left it finite on every rank, so their sum has overflowed" in heard


def cleared_and_edited() -> list[Tensor]:
    """Gradients that were not finite and are gone do no harm; nor do those that a user has mended, in stage 0."""
    results = []
    for stage in STAGES:
        net, model, optimizer = wrapped(stage=stage, check_every=1)
        spoil(net, ODD_PARAM, float("nan"))
        loss_of(model(batch("mlp", 0))).backward()
        if stage == 0:
            for param in net.parameters():
                assert param.grad is not None
                param.grad = param.grad.nan_to_num()
        else:
            optimizer.zero_grad()
            loss_of(model(batch("mlp", 0))).backward()
        optimizer.step()
        results += snapshot(net)
    return results


def test_gradients_that_were_mended_are_finite(run_on_ranks: RunOnRanks) -> None:
    for values in run_on_ranks(2, cleared_and_edited):
        assert all(value.isfinite().all() for value in values)


def scaled(overflow_is_normal: bool) -> str:
    """What the audit says of a gradient that is not finite, under a scaled loss."""
    net, model, optimizer = wrapped(check_every=1)
    spoil(net, ODD_PARAM, float("inf"))
    loss_of(model(batch("mlp", 0))).backward()
    audit = model.features.audit
    assert audit is not None
    step = replace(optimizer._describe_step(), found_inf=torch.tensor(0.0) if overflow_is_normal else None)
    try:
        audit.before_step(step)
    except zeroopt.NonFiniteError:
        return "not finite"
    return "nothing"


def test_overflow_under_a_scaled_loss_is_normal(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, scaled, True) == ["nothing"] * 2
    assert run_on_ranks(2, scaled, False) == ["not finite"] * 2
