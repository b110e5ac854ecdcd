"""`gradient_compression`: what travels as codes, what becomes of what they leave out, and what does not travel so.

Gradients are given, so that the sums that ought to come out are known. What does come out differs from them by what ranks have
kept to send later, and by nothing else, whatever has moved or been saved meanwhile.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transports import hosts
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt import ops
from zeroopt.checkpoint.wrapped.residuals import residual_contents
from zeroopt.collectives import Wire
from zeroopt.diagnosis.footprint import footprint

LR = 0.5
SHAPES = {"a": (64, 96), "b": (80, 64), "vector": (96,), "c": (100, 70), "small": (8, 8), "d": (65, 64), "e": (128, 48)}
TWO_HOSTS = [0, 0, 1, 1]
LEVELS = {"int8": 127, "int4": 7}


class Given(nn.Module):
    """Parameters of which each rank's gradients are what it is given.

    Args:
        as_planned: gradients come in the order that buckets are planned for at first.
    """

    def __init__(self, *, as_planned: bool) -> None:
        super().__init__()
        self.order = list(SHAPES) if as_planned else list(reversed(SHAPES))
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for name in self.order:
            total = total + (getattr(self, name) * gradients[name]).sum()
        return total


def gradients_of(rank: int, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def wrap(of_hosts: list[int] | None = None, seed: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)  # of which rounding takes its own
    net = Given(as_planned=of_hosts is not None)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    options = {"stage": 2, "bucket_mb": 0.06, "fused": False, **options}
    with hosts(of_hosts or [0] * dist.get_world_size()):
        return zeroopt.wrap(net, optimizer, **options)


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.module.named_parameters()}


def train(
    steps: int, of_hosts: list[int] | None = None, **options: Any
) -> tuple[str, dict[str, Tensor], dict[str, Any], int]:
    """The transport's name, parameters, what this rank has left out, and what it has sent of gradients in the last step; every second
    step on the sum of two backward passes, the first of them within no_sync() in every fourth."""
    model, optimizer = wrap(of_hosts, **options)
    number = 0
    for step in range(steps):
        passes = 1 + step % 2 if not options.get("step_in_backward") else 1
        for last in range(passes):
            sent = model.replica.transport.sent_bytes
            with model.no_sync() if step % 4 == 3 and last < passes - 1 else nullcontext():
                model(gradients_of(dist.get_rank(), number)).backward()
            number += 1
        model.replica.reducer.finish()
        sent = model.replica.transport.sent_bytes - sent
        optimizer.step()
        optimizer.zero_grad()
    weights = weights_of(model)
    left = {
        name: (entry["start"], entry["values"].float())
        for name, entry in residual_contents(model).get("left_out", {}).items()
    }
    return model.replica.transport.name, weights, left, sent


def exact_sums(world_size: int, numbers: range) -> dict[str, Tensor]:
    """The means over ranks of all gradients."""
    of_all = [gradients_of(rank, number) for rank in range(world_size) for number in numbers]
    return {name: torch.stack([one[name] for one in of_all]).sum(dim=0) / world_size for name in SHAPES}


def check_conserved(results: list[Any], numbers: range, compression: str) -> None:
    """What has been stepped and what is left out are all gradients, but for the residuals' roundings to bfloat16."""
    world_size = len(results)
    for name, wanted in exact_sums(world_size, numbers).items():
        total = wanted.view(-1).clone()
        sent = -results[0][1][name].view(-1) / LR
        if name in ("vector", "small"):
            torch.testing.assert_close(sent, total, rtol=1e-5, atol=1e-5)
            assert all(name not in left for _, _, left, _ in results)
            continue
        largest = 5 / world_size / LEVELS[compression]  # a step of a normal number's code
        rounded = len(numbers) * world_size * largest * 2**-8
        assert (sent - total).abs().max() > 2 * rounded, "nothing was left out"
        assert (sent - total).abs().max() < 3 * world_size * largest, "what is left out grows from step to step"
        for _, _, left, _ in results:
            start, values = left.get(name, (0, torch.empty(0)))  # none where other ranks of its host send it
            total[start : start + values.numel()] -= values
        assert (sent - total).abs().max() < rounded


@pytest.mark.parametrize(
    ("transport", "options"),
    [
        ("pairwise", {"stage": 1, "gradient_compression": "int8"}),
        ("pairwise", {"stage": 2, "gradient_compression": "int4"}),
        ("pairwise", {"stage": 2, "gradient_compression": "int8", "bucket_mb": 0.008}),  # in stripes
        ("pairwise", {"stage": 2, "gradient_compression": "int8", "step_in_backward": True}),
        ("torch", {"stage": 1, "gradient_compression": "int4"}),
        ("all_to_all", {"stage": 2, "gradient_compression": "int8"}),
    ],
)
def test_what_codes_leave_out_comes_later(run_on_ranks: RunOnRanks, transport: str, options: dict[str, Any]) -> None:
    """Buckets are planned anew in the first step, and what was left out before moves along."""
    results = run_on_ranks(2, train, 6, transport=transport, **options)
    assert results[0][0] == transport
    numbers = range(6) if options.get("step_in_backward") else range(9)
    check_conserved(results, numbers, options["gradient_compression"])
    for name in SHAPES:
        assert torch.equal(results[0][1][name], results[1][1][name])


def test_transports_give_the_same_bits(run_on_ranks: RunOnRanks) -> None:
    pairwise, torch_own, all_to_all = (
        run_on_ranks(2, train, 3, transport=name, gradient_compression="int8")[0][1]
        for name in ("pairwise", "torch", "all_to_all")
    )
    for name in SHAPES:
        assert torch.equal(pairwise[name], torch_own[name])
        assert torch.equal(pairwise[name], all_to_all[name])


@pytest.mark.parametrize("compression", ["int8", "int4"])
def test_only_sums_of_hosts_are_compressed(run_on_ranks: RunOnRanks, compression: str) -> None:
    """Buckets stay as they are here: what moves to another rank of a host is not kept."""
    results = run_on_ranks(4, train, 6, TWO_HOSTS, gradient_compression=compression)
    assert results[0][0] == "hybrid"
    check_conserved(results, range(9), compression)
    padded = sum(math.prod(shape) for name, shape in SHAPES.items() if name not in ("vector", "small"))
    held = [sum(values.numel() for _, values in left.values()) for _, _, left, _ in results]
    assert sum(held) == 2 * padded, "each host has its own, once"


@pytest.mark.parametrize(("compression", "share"), [("int8", 0.27), ("int4", 0.15)])
def test_bytes_on_the_network(run_on_ranks: RunOnRanks, compression: str, share: float) -> None:
    """Of float32's. What travels as it is, and the flags of what was used, are among them."""
    for of_hosts, world_size in ((None, 2), (TWO_HOSTS, 4)):
        transport = "pairwise" if of_hosts is None else "auto"
        plain, coded = (
            run_on_ranks(world_size, train, 1, of_hosts, transport=transport, gradient_compression=option, bucket_mb=1)[
                0
            ][3]
            for option in (None, compression)
        )
        assert 0 < coded < share * plain


def test_nothing_is_compressed_in_shared_memory(run_on_ranks: RunOnRanks) -> None:
    (name, weights, left, sent), _ = run_on_ranks(2, train, 3, gradient_compression="int4")
    assert (name, left, sent) == ("shm", {}, 0)
    for param, plain in run_on_ranks(2, train, 3)[0][1].items():
        assert torch.equal(weights[param], plain)


def overflow() -> list[tuple[bool, bool, float]]:
    """Of each step: whether parameters changed, whether residuals are finite, and the largest of them."""
    model, optimizer = wrap(transport="pairwise", gradient_compression="int8")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    for number in range(4):
        gradients = gradients_of(dist.get_rank(), number)
        if number == 2 and dist.get_rank() == 1:
            gradients["c"][3, 4] = math.inf
        before = weights_of(model)
        scaler.scale(model(gradients)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed = any(not torch.equal(before[name], now) for name, now in weights_of(model).items())
        left = torch.cat([entry["values"] for entry in residual_contents(model)["left_out"].values()])
        seen.append((changed, bool(left.isfinite().all()), left.abs().max().item()))
    return seen


def test_an_overflow_is_found_and_leaves_nothing_behind(run_on_ranks: RunOnRanks) -> None:
    for steps in run_on_ranks(2, overflow):
        assert [changed for changed, _, _ in steps] == [True, True, False, True]
        assert all(finite for _, finite, _ in steps)
        assert [largest > 0 for _, _, largest in steps] == [True, True, False, True]


def save_and_go_on(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    model, optimizer = wrap(transport="pairwise", gradient_compression="int8")
    for number in range(2):
        model(gradients_of(dist.get_rank(), number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    zeroopt.checkpoint.save(path, model, optimizer)
    kept = residual_contents(model)["left_out"]
    model, optimizer = wrap(transport="pairwise", gradient_compression="int8")
    model(gradients_of(dist.get_rank(), 7)).backward()  # which leaves out something else
    optimizer.step()
    zeroopt.checkpoint.load(path, model, optimizer)
    return kept, residual_contents(model)["left_out"]


def go_on_and_resume(path: str, of_hosts: list[int] | None, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What there is two steps after a save, of the run that was saved, and of one that goes on from it."""
    results = []
    for resumes in (False, True):
        model, optimizer = wrap(of_hosts, seed=11 + resumes, **options)
        for number in range(2, 4) if resumes else range(4):
            if number == 2 and resumes:
                zeroopt.checkpoint.load(path, model, optimizer)
            elif number == 2:
                zeroopt.checkpoint.save(path, model, optimizer)
            model(gradients_of(dist.get_rank(), number)).backward()
            optimizer.step()
            optimizer.zero_grad()
        left = {name: entry["values"] for name, entry in residual_contents(model)["left_out"].items()}
        results.append({**weights_of(model), **{f"left out of {name}": values for name, values in left.items()}})
    return results


@pytest.mark.parametrize(
    ("of_hosts", "options"),
    [
        (None, {"gradient_compression": "int8", "parameter_compression": "int4", "transport": "pairwise"}),
        (None, {"gradient_compression": "int4", "stage": 1, "transport": "pairwise"}),
        ([0, 0, 1, 1], {"gradient_compression": "int8", "parameter_compression": "int8"}),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    run_on_ranks: RunOnRanks, tmp_path: Path, of_hosts: list[int] | None, options: dict[str, Any]
) -> None:
    size = 2 if of_hosts is None else len(of_hosts)
    for went_on, resumed in run_on_ranks(size, go_on_and_resume, str(tmp_path / "checkpoint"), of_hosts, options):
        assert set(went_on) == set(resumed) > set(SHAPES)
        assert all(torch.equal(resumed[name], values) for name, values in went_on.items())


def load_on_others(path: str) -> bool:
    """Whether nothing is left out after a load."""
    model, optimizer = wrap(transport="pairwise", gradient_compression="int8")
    model(gradients_of(dist.get_rank(), 7)).backward()
    optimizer.step()
    zeroopt.checkpoint.load(path, model, optimizer)
    return all((entry["values"] == 0).all() for entry in residual_contents(model)["left_out"].values())


def test_checkpoints_have_what_is_left_out(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    for kept, loaded in run_on_ranks(2, save_and_go_on, path):
        assert set(kept) == set(loaded) == set(SHAPES) - {"vector", "small"}
        for name, entry in kept.items():
            assert entry["start"] == loaded[name]["start"]
            assert torch.equal(entry["values"], loaded[name]["values"])
            assert entry["values"].any()
    assert all(run_on_ranks(3, load_on_others, path))


def residual_bytes(of_hosts: list[int] | None, **options: Any) -> tuple[int, int]:
    """As they are told, and elements of the buckets that are compressed."""
    model, optimizer = wrap(of_hosts, **options)
    replica = model.replica
    stores, buckets = replica.reducer.stores, replica.buckets
    arguments = (optimizer._trained.inner, replica.config, replica.transport, replica.bucket_bytes)
    held = footprint(buckets, stores, *arguments)
    numel = sum(
        bucket.padded_numel for bucket, store in zip(buckets, stores, strict=True) if store.residual is not None
    )
    return held.residuals, numel


def test_memory(run_on_ranks: RunOnRanks) -> None:
    compressed = sum(math.prod(shape) for name, shape in SHAPES.items() if name not in ("vector", "small"))
    for num_bytes, numel in run_on_ranks(2, residual_bytes, None, transport="pairwise", gradient_compression="int8"):
        assert compressed <= numel < compressed + 1000
        assert num_bytes == 2 * numel
    for num_bytes, numel in run_on_ranks(4, residual_bytes, TWO_HOSTS, gradient_compression="int4"):
        assert num_bytes == numel
    for num_bytes, _ in run_on_ranks(2, residual_bytes, None, gradient_compression="int4"):
        assert num_bytes == 0


def refuse(**options: Any) -> None:
    wrap(**options)


def refuse_different() -> None:
    wrap(gradient_compression=["int8", "int4"][dist.get_rank()])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"gradient_compression": "int2"},
            "ConfigError",
            "expected gradient_compression to be one of None, 'int8', 'int4'",
        ),
        (
            {"gradient_compression": "int8", "wire": Wire()},
            "ConfigError",
            "expected gradient_compression or wire, got both",
        ),
        (
            {"gradient_compression": "int8", "stage": 0},
            "NotSupportedError",
            "gradient_compression is supported in stages",
        ),
    ],
)
def test_what_is_refused(run_on_ranks: RunOnRanks, options: dict[str, Any], error: str, text: str) -> None:
    for outcome in run_on_ranks.outcomes(2, refuse, **options):
        assert isinstance(outcome, RankError)
        assert outcome.type_name == error
        assert outcome.message.startswith(text)


def test_ranks_have_to_agree(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks.outcomes(2, refuse_different)
    assert first == second
    assert "gradient_compression='int8'" in str(first) and "gradient_compression='int4'" in str(first)


def test_what_is_exempt() -> None:
    from zeroopt.plan.buckets import is_compressible
    from zeroopt.plan.params import ManagedParam

    def managed(*shape: int) -> ManagedParam:
        return ManagedParam("p", nn.Parameter(torch.zeros(shape)), 0, 0, 0)

    assert is_compressible(managed(64, 64), torch.float32)
    assert not is_compressible(managed(100_000), torch.float32)
    assert not is_compressible(managed(63, 64), torch.float32)
    assert not is_compressible(managed(64, 64), torch.float64)
    assert torch.float64 not in ops.WIRE_DTYPES


def norm_without_one_head(codes: str | None) -> float:
    """Of the gradients of a step that leaves out a head whose gradients were large in the one before."""
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in ("trunk", "rare")})
    _, optimizer = zeroopt.wrap(
        net, torch.optim.SGD(net.parameters(), lr=1e-3), stage=2, transport="pairwise", gradient_compression=codes
    )
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    norms = []
    for scale in (1e4, None):
        hidden = net["trunk"](x)
        loss = hidden.square().mean()
        if scale is not None:
            loss = loss + scale * net["rare"](hidden.detach()).square().mean()
        loss.backward()
        norms.append(float(optimizer.clip_grad_norm_(1e9)))
        optimizer.step()
        optimizer.zero_grad()
    return norms[-1]


def test_what_was_left_out_of_a_gradient_that_does_not_come_belongs_to_no_norm(run_on_ranks: RunOnRanks) -> None:
    plain = run_on_ranks(2, norm_without_one_head, None)[0]
    coded = run_on_ranks(2, norm_without_one_head, "int8")[0]
    assert coded == pytest.approx(plain, rel=0.1)
