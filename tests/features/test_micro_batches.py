"""One step's micro-batches give the same weights, bit for bit, on every number of ranks that shares them."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lone import Lone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import Halves, Mlp
from transports import hosts
from whole_optimizers import Lars
from worker_pool import WORKER_DIED, RunOnRanks

import zeroopt
from zeroopt import ConfigError, NotSupportedError, StateError

TOTAL = 8  # micro-batches of a step
STEPS = 5
CLIP = {"max_norm", "by_torch"}  # options of `take_step`


class Net(nn.Module):
    """Some parameters that not every micro-batch uses, one that none does, and a matrix that is used twice.

    Args:
        reentrant: activations are computed again by backward passes within the backward.
    """

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.mlp, self.halves, self.twice = Mlp(), Halves(), nn.Linear(7, 7, bias=False)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self._run(lambda y: torch.tanh(self.twice(torch.tanh(self.twice(y)))), x)
        return self._run(self.mlp, x).square().mean() + self._run(self.halves, x).sin().mean()

    def _run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.reentrant:
            return part(x)
        again: Tensor = checkpoint(part, x.requires_grad_() if x.is_leaf else x, use_reentrant=True)
        return again


def digest(model: nn.Module) -> str:
    """Of all bits of the parameters."""
    one = hashlib.sha256()
    for param in model.parameters():
        one.update(param.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return one.hexdigest()


def inputs(step: int, number: int) -> Tensor:
    """Micro-batch `number` of a step."""
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(1000 * step + number))


def take_step(
    model: Any,
    optimizer: Any,
    step: int,
    total: int = TOTAL,
    scaler: Any = None,
    max_norm: float = 0.0,
    by_torch: bool = False,
) -> None:
    """One step of this rank's share."""
    rank, count = dist.get_rank(), total // dist.get_world_size()
    for i in range(count):
        with model.no_sync() if i < count - 1 else nullcontext():
            number = rank * count + i
            loss = model(inputs(step, number)) / count
            if scaler is not None and (step, number) == (1, 3):
                loss = loss * torch.inf  # all leave the step out
            (loss if scaler is None else scaler.scale(loss)).backward()
    if max_norm:
        if scaler is not None:
            scaler.unscale_(optimizer)
        if by_torch:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        else:
            optimizer.clip_grad_norm_(max_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def wrapped(
    total: int = TOTAL, make: Any = torch.optim.AdamW, *, reentrant: bool = False, **options: Any
) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = Net(reentrant=reentrant)
    options.setdefault("micro_batches", total // dist.get_world_size())
    return zeroopt.wrap(net, make(net.parameters(), lr=0.01), **options)


def train(variants: list[dict[str, Any]]) -> list[str]:
    """What becomes of the model, by variant."""
    digests = []
    for variant in variants:
        options = dict(variant)
        scaled, clip = options.pop("scaled", False), {key: options.pop(key) for key in CLIP & options.keys()}
        if options.pop("shards", False) and dist.get_world_size() == 4:
            options["shard_group"] = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
        with hosts([number // 2 for number in range(8)]) if options.pop("hosts", False) else nullcontext():
            model, optimizer = wrapped(**options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2) if scaled else None
        for step in range(STEPS):
            take_step(model, optimizer, step, scaler=scaler, **clip)
        digests.append(digest(model))
    return digests


ALIKE: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1, "bucket_mb": 0.002},
    {"stage": 2, "bucket_mb": 0.002},  # with stripes
    {"stage": 2, "overlap": False, "transport": "pairwise"},
    {"stage": 1, "transport": "tree", "bucket_mb": 0.01},
    {"stage": 2, "transport": "all_to_all", "share_parameters": False},
    {"stage": 2, "share_parameters": True},
    {"stage": 1, "hosts": True},
    {"stage": 2, "hosts": True, "transport": "hierarchy"},
    {"stage": 2, "shards": True},
    {"stage": 0, "reentrant": True},
    {"stage": 2, "reentrant": True, "bucket_mb": 0.002},
]
CLIPPED: list[dict[str, Any]] = [
    {"stage": 0, "max_grad_norm": 0.05},
    {"stage": 1, "max_grad_norm": 0.05, "bucket_mb": 0.002},
    {"stage": 2, "max_grad_norm": 0.05},
    {"stage": 2, "max_norm": 0.05, "bucket_mb": 0.002},
]
SCALED: list[dict[str, Any]] = [
    {"stage": 0, "scaled": True, "max_norm": 0.05},
    {"stage": 1, "scaled": True, "max_grad_norm": 0.05},
    {"stage": 2, "scaled": True, "max_norm": 0.05, "bucket_mb": 0.002},
]
BY_TORCH: list[dict[str, Any]] = [
    {"stage": 1, "max_norm": 0.05, "by_torch": True},
    {"stage": 2, "scaled": True, "max_norm": 0.05, "by_torch": True, "bucket_mb": 0.002},
    {"stage": 0, "max_norm": 0.05, "by_torch": True},  # of its own bits
]
TIERS: list[dict[str, Any]] = [
    {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_inputs": True},
    {"param_dtype": torch.bfloat16, "master_weights": "none", "reduce_dtype": torch.float32, "cast_inputs": True},
    {"state_dtype": torch.int8},
    {"fused": False, "make": torch.optim.SGD},
    {"make": Lars},  # steps whole parameters
]


def test_any_number_of_ranks_gives_the_same_bits(run_on_ranks: RunOnRanks) -> None:
    groups = [ALIKE, CLIPPED, SCALED, *([each] for each in (*BY_TORCH, *TIERS))]
    variants = [variant for group in groups for variant in group]
    found = {ranks: run_on_ranks(ranks, train, variants) for ranks in (1, 2, 4)}
    first = found[1][0]
    for results in found.values():
        assert all(each == first for each in results)
    digests = iter(first)
    of_group = [{next(digests) for _ in group} for group in groups]
    assert all(len(each) == 1 for each in of_group)
    assert len(set().union(*of_group[:3], *of_group[-len(TIERS) :])) == 3 + len(TIERS), "all options matter"


def test_eight_ranks_do(run_on_ranks: RunOnRanks) -> None:
    variants = [ALIKE[0], CLIPPED[3]]
    first = run_on_ranks(1, train, variants)[0]
    assert run_on_ranks(8, train, variants) == [first] * 8


def train_on(path: str, begin: int, end: int, *, dies: bool) -> str:
    """From the checkpoint of a step to that of another one, and on."""
    model, optimizer = wrapped(max_grad_norm=0.05)
    if begin:
        zeroopt.checkpoint.load(f"{path}/{begin}", model, optimizer)
    for step in range(begin, end):
        take_step(model, optimizer, step)
    zeroopt.checkpoint.save(f"{path}/{end}", model, optimizer)
    if dies:
        take_step(model, optimizer, end)  # of which nothing is left
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(model)


def test_a_run_that_goes_on_with_other_ranks_does(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = run_on_ranks(1, train_on, str(tmp_path / "whole"), 0, 6, dies=False)[0]
    path = str(tmp_path / "parts")
    for ranks, begin, end in ((4, 0, 2), (2, 2, 4)):
        died = run_on_ranks.outcomes(ranks, train_on, path, begin, end, dies=True)
        assert died == [(WORKER_DIED, "killed by SIGKILL")] * ranks
    assert run_on_ranks(8, train_on, path, 4, 6, dies=False) == [expected] * 8


def test_without_it_the_bits_depend_on_the_number_of_ranks(run_on_ranks: RunOnRanks) -> None:
    """What the other tests would not notice if their model were too small for it."""
    assert run_on_ranks(1, train, [{"micro_batches": None}])[0] != run_on_ranks(2, train, [{"micro_batches": None}])[0]


def train_by_two() -> str:
    """Of two optimizers of one model, each cleared by itself."""
    torch.manual_seed(0)
    net = Net()
    count = TOTAL // dist.get_world_size()
    model, first = zeroopt.wrap(net, torch.optim.SGD(net.mlp.parameters(), lr=0.1), micro_batches=count)
    rest = [*net.halves.parameters(), *net.twice.parameters()]
    model, second = zeroopt.wrap(model, torch.optim.AdamW(rest, lr=0.01), micro_batches=count)
    for step in range(STEPS):
        for i in range(count):
            with model.no_sync() if i < count - 1 else nullcontext():
                (model(inputs(step, dist.get_rank() * count + i)) / count).backward()
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
    return digest(model)


def test_two_optimizers_of_a_model_do(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, train_by_two)[0] == run_on_ranks(1, train_by_two)[0]


def train_one_of_two(stage: int) -> bool:
    """Of two optimizers of one model, the second of which trains what nobody uses. Whether that stays."""
    net = Halves()
    before = net.never.weight.detach().clone()
    options: dict[str, Any] = {"stage": stage, "micro_batches": 2}
    model, first = zeroopt.wrap(net, torch.optim.AdamW(net.up.parameters()), **options)
    model, second = zeroopt.wrap(model, torch.optim.AdamW(net.never.parameters()), **options)
    for step in range(2):
        for local in (True, False):
            with model.no_sync() if local else nullcontext():
                model.up(inputs(step, dist.get_rank())).square().mean().backward()
        for optimizer in (first, second):
            optimizer.step()
        for optimizer in (first, second):
            optimizer.zero_grad()
    return torch.equal(net.never.weight, before)


@pytest.mark.parametrize("stage", [0, 2])
def test_an_optimizer_whose_parameters_were_not_used(run_on_ranks: RunOnRanks, stage: int) -> None:
    assert all(run_on_ranks(2, train_one_of_two, stage))


def test_two_optimizers_begin_a_step_anew() -> None:
    net = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    model, first = zeroopt.wrap(net, torch.optim.SGD(net[0].parameters(), lr=0.1), micro_batches=2)
    model, second = zeroopt.wrap(model, torch.optim.SGD(net[1].parameters(), lr=0.1), micro_batches=2)
    with model.no_sync():
        model(inputs(0, 0)).sum().backward()  # after which something has raised
    first.zero_grad()
    second.zero_grad()
    for number in range(2):
        with model.no_sync() if number == 0 else nullcontext():
            model(inputs(0, number)).sum().backward()
    expected = sum(inputs(0, number).sum(0) for number in range(2))
    torch.testing.assert_close(first.full_grad(net[0].weight), net[1].weight.sum(0).outer(expected))
    first.step()
    second.step()


def test_a_matrix_of_several_segments_is_refused() -> None:
    """Autograd adds up what comes of each, in an order that depends on how micro-batches are shared."""
    net = nn.Linear(7, 7)
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), micro_batches=1)
    x = inputs(0, 0).requires_grad_()
    for _ in range(2):
        x = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(StateError, match="arrived twice in one backward"):
        x.sum().backward()


STAGES = (0, 1, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_the_sum(stage: int) -> None:
    plain = Lone()
    tree = Lone(stage, micro_batches=4)
    for number in range(4):
        plain.backward(number)
        with tree.model.no_sync() if number < 3 else nullcontext():
            tree.backward(number)
    for mine, theirs in zip(tree.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(tree.optimizer.full_grad(mine), plain.optimizer.full_grad(theirs))


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_has_as_many_backward_passes(stage: int) -> None:
    lone = Lone(stage, micro_batches=4)
    with lone.model.no_sync():
        lone.backward()
    with pytest.raises(
        StateError, match=r"3 backward passes under no_sync\(\) and one outside of it.*got 1 of them under no_sync\(\)"
    ):
        lone.backward()
    lone.optimizer.zero_grad()
    with lone.model.no_sync(), pytest.raises(StateError, match="got 4 of them under no_sync"):
        for number in range(4):
            lone.backward(number)
    lone.optimizer.zero_grad()
    with lone.model.no_sync():
        lone.backward()
        lone.backward()
    with pytest.raises(StateError, match="got 2 of them under no_sync\\(\\) before step"):
        lone.optimizer.step()
    lone.optimizer.zero_grad()
    for number in range(4):
        with lone.model.no_sync() if number < 3 else nullcontext():
            lone.backward(number)
    lone.optimizer.step()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_of_a_step_before_are_cleared(stage: int, count: int) -> None:
    lone = Lone(stage, micro_batches=count)
    for number in range(count):
        with lone.model.no_sync() if number < count - 1 else nullcontext():
            lone.backward(number)
    lone.optimizer.step()
    with lone.model.no_sync() if count > 1 else nullcontext(), pytest.raises(StateError, match="clear them by"):
        lone.backward()


def test_a_backward_that_raises_can_be_forgotten() -> None:
    lone, expected = Lone(2, micro_batches=4), Lone(2, micro_batches=4)
    param = lone.net[0].weight

    def fail(_: Tensor) -> None:
        raise ValueError("by the user")

    with lone.model.no_sync():
        lone.backward()
        lone.backward()
        handle = param.register_post_accumulate_grad_hook(fail)
        with pytest.raises(ValueError, match="by the user"):
            lone.backward()
        handle.remove()
    lone.optimizer.zero_grad()
    for each in (lone, expected):
        for number in range(4):
            with each.model.no_sync() if number < 3 else nullcontext():
                each.backward(number)
        each.optimizer.step()
    assert digest(lone.net) == digest(expected.net)


@pytest.mark.parametrize("transport", ["torch"])
def test_transports_that_sum_in_another_order_are_refused(run_on_ranks: RunOnRanks, transport: str) -> None:
    def name(outcome: Any) -> tuple[str, str]:
        return outcome.type_name, outcome.message.partition(",")[0]

    outcomes = run_on_ranks.outcomes(2, train, [{"transport": transport}])
    assert set(map(name, outcomes)) == {("NotSupportedError", "micro_batches needs sums in one tree over ranks")}


def wrap_on_scattered_hosts() -> str:
    with hosts([0, 1, 0, 1]), pytest.raises(NotSupportedError) as caught:
        wrapped()
    shards = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    with pytest.raises(NotSupportedError):
        wrapped(shard_group=shards[dist.get_rank() % 2])
    return str(caught.value)


def test_hosts_that_do_not_follow_one_another_are_refused(run_on_ranks: RunOnRanks) -> None:
    assert all(
        "transport 'hybrid' adds up in another order" in text for text in run_on_ranks(4, wrap_on_scattered_hosts)
    )


def test_three_ranks_are_refused(run_on_ranks: RunOnRanks) -> None:
    outcomes = run_on_ranks.outcomes(3, train, [{"micro_batches": 2}])
    assert all("another power of two ranks" in outcome.message and "got 3" in outcome.message for outcome in outcomes)


def test_join_is_refused() -> None:
    with (
        pytest.raises(NotSupportedError, match="join\\(\\) is not supported with micro_batches"),
        Lone(micro_batches=1).model.join(),
    ):
        pass


def test_a_16_bit_sum_is_refused() -> None:
    with pytest.raises(ConfigError, match="would travel in torch.bfloat16.*pass reduce_dtype=torch.float32"):
        Lone(2, micro_batches=2, param_dtype=torch.bfloat16)
