"""Gradients from autograd to their sum over ranks: accumulation, no_sync, unused parameters, what goes wrong."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from follow import inputs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import MODELS, batch, build, loss_of, optimizer_for, prepare, snapshot
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.gradients.sharded_tensor import ShardedGradient

STAGES = (0, 1, 2)
Options = dict[str, Any] | None


def accumulate(options: Options, micro_batches: int, no_sync: bool) -> list[Tensor]:
    """Two steps of several backward passes each."""
    net = build("lm")
    model, optimizer = prepare(net, optimizer_for("adamw", net), options)
    for step in range(2):
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            with model.no_sync() if no_sync and not last else nullcontext():  # type: ignore[operator]
                (loss_of(model(batch("lm", 10 * step + micro))) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


def accumulate_all(variants: list[Options], no_sync: bool) -> list[list[Tensor]]:
    return [accumulate(options, 3, no_sync) for options in variants]


@pytest.mark.parametrize("no_sync", [True, False])
@pytest.mark.parametrize("bucket_mb", [25.0, 0.001])
def test_accumulation_follows_ddp(run_on_ranks: RunOnRanks, no_sync: bool, bucket_mb: float) -> None:
    variants = [None, *({"stage": s, "fused": False, "bucket_mb": bucket_mb} for s in STAGES)]
    for rank in run_on_ranks(2, accumulate_all, variants, no_sync):
        for history in rank[1:]:
            for want, got in zip(rank[0], history, strict=True):
                if no_sync:
                    assert torch.equal(want, got)
                else:  # the sum of several backward passes is rounded in another order, and Adam divides by it
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(rank[2], rank[3], strict=True)), "stages 1 and 2 differ"


# One letter for each micro-batch, by rank: s is a forward and backward outside of no_sync(), n within; f a forward within, of which
# the backward is outside, b the other way round; z clears the gradients there are.
MIXTURES = (
    ("nnns", "s"),
    ("s", "nbs"),
    ("ff", "ss"),
    ("bns", "f"),
    ("bzs", "nnf"),
    ("snbf", "fs"),
    ("szns", "nfzbs"),
)


class Normed(nn.Module):
    """A micro-batch within `no_sync()` uses a layer of its own; statistics are kept of all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in "snfb"})
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor, name: str) -> Tensor:
        return self.norm(x + self.layers[name](x) + self.layers["s"](x))


def mix(options: Options) -> None:
    """Assert that gradients are the mean over ranks of what each has summed, and buffers those of rank 0."""
    own = Normed().double()
    net = deepcopy(own)
    model, optimizer = prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), options)
    for number, mixture in enumerate(MIXTURES):
        for micro, how in enumerate(mixture[dist.get_rank()]):
            if how == "z":
                optimizer.zero_grad()
                own.zero_grad()
                continue
            x = inputs(10 * number + micro, 4, 6).double()
            with model.no_sync() if how in "nf" else nullcontext():  # type: ignore[operator]
                loss = model(x, how).square().sum()
            with model.no_sync() if how in "nb" else nullcontext():  # type: ignore[operator]
                loss.backward()
            own(x, how).square().sum().backward()
        for param, alone in zip(net.parameters(), own.parameters(), strict=True):
            mean = torch.zeros_like(alone) if alone.grad is None else alone.grad / dist.get_world_size()
            dist.all_reduce(mean)
            assert (param.grad is not None) or not mean.any(), mixture
            if param.grad is not None:
                torch.testing.assert_close(optimizer.full_grad(param), mean, msg=lambda text, m=mixture: f"{m}: {text}")
        optimizer.step()
        optimizer.zero_grad()
        own.load_state_dict(net.state_dict())
        own.zero_grad()
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 6).double(), "s")
    for buffer in net.buffers():
        first = buffer.clone()
        dist.broadcast(first, 0)
        assert torch.equal(buffer, first)


def mix_all(variants: list[Options]) -> None:
    for options in variants:
        mix(options)


def test_ranks_may_mix_micro_batches_of_all_kinds(run_on_ranks: RunOnRanks) -> None:
    """As many backward passes outside of `no_sync()` on every rank, and whatever else each rank likes."""
    shm: list[Options] = [{"stage": stage, "bucket_mb": 0.0005} for stage in STAGES]
    run_on_ranks(2, mix_all, [*shm, {"stage": 2, "bucket_mb": 0.0005, "transport": "pairwise", "overlap": False}])


class Branches(nn.Module):
    """Which branches run depends on the rank; one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 5)
        self.even, self.odd, self.idle, self.never = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = self.trunk(x)
        x = self.even(x) if dist.get_rank() % 2 == 0 else self.odd(x)
        return x if step == 1 else self.idle(x)


def train_branches(options: Options, transport_bucket_mb: float) -> list[Tensor]:
    torch.manual_seed(0)
    net = Branches()
    # Weight decay and momentum move a parameter whose gradient is zero, but not one that has none.
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    model: nn.Module
    if options is None:
        model = DistributedDataParallel(net, find_unused_parameters=True)
    else:
        model, optimizer = zeroopt.wrap(net, optimizer, bucket_mb=transport_bucket_mb, **options)
    for step in range(4):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(step * 10 + dist.get_rank()))
        loss_of(model(x, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


def train_branches_all(bucket_mb: float) -> list[list[Tensor]]:
    variants: list[Options] = [None, *({"stage": s, "fused": f} for s in STAGES for f in (False, True))]
    return [train_branches(options, bucket_mb) for options in variants]


@pytest.mark.parametrize("bucket_mb", [25.0, 0.0001])
@pytest.mark.parametrize("world_size", [2, 3])
def test_unused_parameters_follow_ddp(run_on_ranks: RunOnRanks, world_size: int, bucket_mb: float) -> None:
    for rank in run_on_ranks(world_size, train_branches_all, bucket_mb):
        for history in rank[1:]:
            for want, got in zip(rank[0], history, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


class UsedTwice(nn.Module):
    """A layer that two segments of checkpointing use, and heads of which each rank uses its own, so that one rank alone fills the buckets before
    that of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.between = nn.Linear(16, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, *, again: bool) -> Tensor:
        for part in (self.layer, self.between, self.layer, *self.heads[dist.get_rank() :: 2]):
            x = checkpoint(part, x, use_reentrant=True) if again else part(x)
        return x


def train_used_twice(options: Options) -> list[list[Tensor]]:
    histories = []
    for again in (False, True):
        torch.manual_seed(0)
        net = UsedTwice()
        model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), bucket_mb=0.002, **options)
        for _ in range(2):
            loss_of(model(torch.ones(2, 16, requires_grad=True), again=again)).backward()
            optimizer.step()
            optimizer.zero_grad()
        histories.append(snapshot(net))
    return histories


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_use_other_parameters_reduce_as_often(run_on_ranks: RunOnRanks, stage: int) -> None:
    for expected, found in run_on_ranks(2, train_used_twice, {"stage": stage}):
        for want, got in zip(expected, found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


class UsedUnequally(nn.Module):
    """Layers that each rank uses as often as it is told to, the first one several times.

    Args:
        has_head: the first gradient comes from outside of all segments.
    """

    def __init__(self, *, has_head: bool) -> None:
        super().__init__()
        self.layer, self.between = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 8) if has_head else nn.Identity()

    def forward(self, x: Tensor, uses: int, *, again: bool) -> Tensor:
        for part in (*[self.layer] * uses, self.between):
            x = checkpoint(part, x, use_reentrant=True) if again else part(x)
        result: Tensor = self.head(x)
        return result


# How often each rank uses the layer, and which of them compute activations again.
UNEQUAL_USES = {
    "the first more often": ((3, 1), (True, True)),
    "the last more often": ((1, 4), (True, True)),
    "one not at all": ((2, 0), (True, True)),
    "one in no backward within another": ((3, 2), (True, False)),
}


def train_used_unequally(stage: int, backwards: int, has_head: bool) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    histories: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for name, (uses, recomputes) in UNEQUAL_USES.items():
        by_both = []
        for recomputed in (False, True):
            torch.manual_seed(0)
            net = UsedUnequally(has_head=has_head)
            model, optimizer = zeroopt.wrap(
                net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, bucket_mb=1e-4, max_grad_norm=0.1
            )
            for step in range(3):
                for number in range(backwards):
                    x = inputs(10 * step + number, 2, 8).requires_grad_()
                    again = recomputed and recomputes[dist.get_rank()]
                    loss_of(model(x, uses[dist.get_rank()], again=again)).backward()
                optimizer.step()
                optimizer.zero_grad()
            by_both.append(snapshot(net))
        histories[name] = by_both[0], by_both[1]
    return histories


@pytest.mark.parametrize(("backwards", "has_head"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_may_use_a_parameter_in_unequally_many_reentrant_segments(
    run_on_ranks: RunOnRanks, stage: int, backwards: int, has_head: bool
) -> None:
    for histories in run_on_ranks(2, train_used_unequally, stage, backwards, has_head):
        for name, (expected, found) in histories.items():
            for want, got in zip(expected, found, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=name)


def collectives_behind_backward(stages: Sequence[int], *, plainly: bool) -> list[float]:
    """A collective of the user's right behind each backward, of which the second is the first in which ranks use the layer unequally often.

    Args:
        plainly: the last rank computes nothing again in it.
    """
    sums = []
    for stage in stages:
        net = UsedUnequally(has_head=True)
        model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, bucket_mb=1e-4)
        is_first = dist.get_rank() == 0
        for uses, again in ((1, True), (1 + 2 * is_first, is_first or not plainly), (1, not plainly)):
            loss_of(model(inputs(0, 2, 8).requires_grad_(), uses, again=again)).backward()
            total = torch.ones(1)
            dist.all_reduce(total)
            sums.append(total.item())
            optimizer.step()
            optimizer.zero_grad()
    return sums


@pytest.mark.parametrize("plainly", [False, True])
def test_a_backward_ends_when_all_ranks_are_through_with_their_segments(
    run_on_ranks: RunOnRanks, plainly: bool
) -> None:
    """Whoever went on to the next collective would wait there for those that go on with the backward, and they for it."""
    assert run_on_ranks(2, collectives_behind_backward, STAGES, plainly=plainly) == [[2.0] * 9] * 2


def forwards_behind_backward(joins: bool) -> list[list[Tensor]]:
    """Between two backward passes of a step, a forward that takes buffers over. In the first one of the last step the last rank computes nothing
    again, other than the first rank, and before it nobody has. By DDP, then in each stage."""
    is_last = dist.get_rank() == 1
    ends = []
    for stage in (None, *STAGES):
        torch.manual_seed(0)
        net = UsedUnequally(has_head=True)
        net.register_buffer("seen", torch.zeros(1))
        options = None if stage is None else {"stage": stage, "bucket_mb": 1e-4}
        model, optimizer = prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), options)
        with model.join() if joins and options else nullcontext():
            for uses, again in ((1, False), (3 - 2 * is_last, not is_last)):
                for number in range(2):
                    x = inputs(number, 2, 8).requires_grad_()
                    loss_of(model(x, uses, again=options is not None and again and number == 0)).backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(snapshot(net))
    return ends


@pytest.mark.parametrize("joins", [False, True])
def test_a_forward_that_takes_buffers_over_waits_for_others_segments(run_on_ranks: RunOnRanks, joins: bool) -> None:
    for expected, *found in run_on_ranks(2, forwards_behind_backward, joins):
        for end in found:
            torch.testing.assert_close(end, expected)


Program = list[Any]
"""Numbers of layers that are used one after the other, and programs in a segment of their own."""


def run_program(layers: nn.ModuleList, program: Program, x: Tensor, *, again: bool) -> Tensor:
    for part in program:
        if isinstance(part, int):
            x = layers[part](x)
        elif again:
            x = checkpoint(partial(run_program, layers, part, again=True), x, use_reentrant=True)
        else:
            x = run_program(layers, part, x, again=False)
    return x


def gradients_of_programs(stage: int, programs: Sequence[Program]) -> list[tuple[Tensor | None, Tensor]]:
    """Each rank has a program of its own: what the gradients of two layers are, and have to be."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    reference = deepcopy(net)
    _, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters()), stage=stage, bucket_mb=1e-5)
    for layers in (reference, net):
        x = inputs(0, 2, 4).requires_grad_()
        loss_of(run_program(layers, programs[dist.get_rank()], x, again=layers is net)).backward()
    found = []
    for param, twin in zip(net.parameters(), reference.parameters(), strict=True):
        assert twin.grad is not None
        dist.all_reduce(twin.grad.div_(2))
        found.append((optimizer.full_grad(param), twin.grad))
    return found


PROGRAMS = {
    "plainly and in a segment": ([1, [0], [1]], [[1], [0], 1]),
    "in segments within segments": ([[1, [1], 0]], [[[0, [1], 1], 0], [1, [1]], 0]),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("stage", STAGES)
def test_reentrant_segments_may_use_what_others_use(run_on_ranks: RunOnRanks, stage: int, name: str) -> None:
    for pairs in run_on_ranks(2, gradients_of_programs, stage, PROGRAMS[name]):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected)


def test_a_gradient_that_autograd_has_added_to_what_travels_is_refused(run_on_ranks: RunOnRanks) -> None:
    """Nothing tells, in stage 0, of a backward within another before the first gradient of it."""
    programs = ([[0], [1], 1],) * 2
    for error in run_on_ranks.outcomes(2, gradients_of_programs, 0, programs):
        assert isinstance(error, RankError) and "came once more, and first of all in a backward within" in str(error)
    for pairs in run_on_ranks(2, gradients_of_programs, 1, programs):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected)


def retry_after_an_error(stage: int) -> None:
    net = UsedUnequally(has_head=False)
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.parameters()), stage=stage)
    handle = net.layer.weight.register_hook(lambda _: 1 / 0)
    for _ in range(2):
        with suppress(ZeroDivisionError):
            loss_of(model(inputs(0, 2, 8).requires_grad_(), 2, again=True)).backward()
        handle.remove()


@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_has_raised_is_not_gone_on_with_by_the_next(run_on_ranks: RunOnRanks, stage: int) -> None:
    for error in run_on_ranks.outcomes(2, retry_after_an_error, stage):
        assert isinstance(error, RankError) and "arrived twice in one backward" in str(error)


def gradient_with_a_late_hook(stage: int) -> tuple[Tensor | None, Tensor]:
    """The gradient of a parameter of two reentrant segments, with a hook of the user's behind ours; and the mean that it should be."""
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
    _, optimizer = zeroopt.wrap(layer, torch.optim.SGD(layer.parameters()), stage=stage)

    def double(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(2.0)

    layer.weight.register_post_accumulate_grad_hook(double)  # type: ignore[no-untyped-call]
    x = torch.full((1, 3), 1.0 + dist.get_rank(), requires_grad=True)
    checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).sum().backward()
    return optimizer.full_grad(layer.weight), torch.full((3, 3), 1.5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_hook_behind_ours_on_a_parameter_of_several_reentrant_segments(run_on_ranks: RunOnRanks, stage: int) -> None:
    for found, once in run_on_ranks(2, gradient_with_a_late_hook, stage):
        # Twice what comes first, which is there when the hook doubles what comes next.
        assert found is not None and torch.equal(found, (2 * once + once) * 2)


def gradients_after_backward(stage: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """What param.grad shows, None for a sharded gradient, and the mean gradient that DDP computes."""
    net, reference = build("mlp"), build("mlp")
    model, _ = zeroopt.wrap(net, optimizer_for("sgd", net), stage=stage)
    loss_of(model(batch("mlp", 0))).backward()
    ddp = DistributedDataParallel(reference)
    loss_of(ddp(batch("mlp", 0))).backward()
    shown = [None if isinstance(p.grad, ShardedGradient) else p.grad.clone() for p in net.parameters()]
    return shown, [p.grad.clone() for p in reference.parameters() if p.grad is not None]


def test_param_grad_by_stage(run_on_ranks: RunOnRanks) -> None:
    for shown, expected in run_on_ranks(2, gradients_after_backward, 0):
        assert len(shown) == len(expected)
        assert all(g is not None and torch.equal(g, e) for g, e in zip(shown, expected, strict=True))
    for stage in (1, 2):
        for shown, _ in run_on_ranks(2, gradients_after_backward, stage):
            assert shown == [None] * len(shown)


def edit_gradients(wrapped: bool) -> list[Tensor]:
    """Stage 0 steps what the user leaves in param.grad: edited in place, replaced, removed."""
    net = build("mlp")
    model, optimizer = prepare(net, optimizer_for("adamw", net), {"stage": 0, "fused": False} if wrapped else None)
    for step in range(2):
        loss_of(model(batch("mlp", step))).backward()
        params = list(net.parameters())
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        params[0].grad = torch.ones_like(params[0])
        params[1].grad = None
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


def test_stage_0_steps_the_visible_gradients(run_on_ranks: RunOnRanks) -> None:
    plain, wrapped = run_on_ranks(2, edit_gradients, False), run_on_ranks(2, edit_gradients, True)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], wrapped[0], strict=True))


def clear(how: str, stage: int) -> list[Tensor]:
    """A backward whose gradients are thrown away, by one of the ways to do so, then one that counts."""
    net = build("mlp")
    inner = optimizer_for("sgd", net)
    model, optimizer = zeroopt.wrap(net, inner, stage=stage)
    ways: dict[str, Callable[[], None]] = {
        "nothing to clear": lambda: None,
        "optimizer": optimizer.zero_grad,
        "model": model.zero_grad,
        "wrapped optimizer": inner.zero_grad,
        "zeros": lambda: optimizer.zero_grad(set_to_none=False),
        "model zeros": lambda: model.zero_grad(set_to_none=False),
    }
    if how != "nothing to clear":
        loss_of(model(batch("mlp", 1))).backward()
        with model.no_sync():
            loss_of(model(batch("mlp", 2))).backward()
    ways[how]()
    loss_of(model(batch("mlp", 0))).backward()
    optimizer.step()
    return snapshot(net)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["optimizer", "model", "wrapped optimizer", "zeros", "model zeros"])
def test_zero_grad_forgets_all_gradients(run_on_ranks: RunOnRanks, how: str, stage: int) -> None:
    expected = run_on_ranks(2, clear, "nothing to clear", stage)
    for rank, cleared in enumerate(run_on_ranks(2, clear, how, stage)):
        assert all(torch.equal(a, b) for a, b in zip(expected[rank], cleared, strict=True))


def zero_gradients_still_step(stage: int) -> tuple[list[Tensor], list[Tensor]]:
    """Momentum goes on under a gradient of zero, as with a plain optimizer."""
    plain, net = build("mlp"), build("mlp")
    plain_optimizer = optimizer_for("sgd_momentum", plain)
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd_momentum", net), stage=stage, fused=False)
    for one_model, one_optimizer in ((plain, plain_optimizer), (model, optimizer)):
        loss_of(one_model(torch.ones(2, 7))).backward()
        one_optimizer.step()
        one_optimizer.zero_grad(set_to_none=False)
        one_optimizer.step()
    return snapshot(plain), snapshot(net)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_without_none_keeps_zeros(run_on_ranks: RunOnRanks, stage: int) -> None:
    for plain, wrapped in run_on_ranks(2, zero_gradients_still_step, stage):
        assert all(torch.equal(a, b) for a, b in zip(plain, wrapped, strict=True))


def go_wrong(how: str) -> str:
    net = build("mlp")
    if how == "unfrozen":
        net.layers[0].weight.requires_grad_(False)
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net))
    try:
        if how == "cast":
            net.double()
            model(batch("mlp", 0).double()).sum().backward()
        elif how == "moved before step":
            loss_of(model(batch("mlp", 0))).backward()
            net.scale.data = net.scale.data.clone()
            optimizer.step()
        elif how == "replaced":
            net.layers[0] = nn.Linear(7, 33)
            loss_of(model(batch("mlp", 0))).backward()
            optimizer.step()
        elif how == "only no_sync":
            with model.no_sync():
                loss_of(model(batch("mlp", 0))).backward()
            optimizer.step()
        elif how == "unfrozen":
            net.layers[0].weight.requires_grad_(True)
            loss_of(net(batch("mlp", 0))).backward()  # past the wrapped model
            optimizer.step()
        elif how == "backward raised":
            net.layers[0].weight.register_hook(fail)
            with suppress(ZeroDivisionError):
                loss_of(model(batch("mlp", 0))).backward()
            optimizer.step()
        elif how == "step between":
            loss = loss_of(model(batch("mlp", 0)))
            loss.backward(retain_graph=True)
            optimizer.step()
            try:
                loss.backward()
            except RuntimeError as error:
                return str(error)
        elif how == "inner step":
            optimizer._inner.step()
        elif how == "sparse":
            weight = net.layers[0].weight
            index = torch.zeros(1, dtype=torch.int64)
            nn.functional.embedding(index, weight, sparse=True).sum().backward()
    except zeroopt.ZeroOptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail(grad: Tensor) -> Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("unfrozen", "StateError: parameter 'layers.0.weight' was frozen and has got a gradient of this rank alone"),
        ("backward raised", "StateError: the last backward did not come to its end"),
        (
            "step between",
            "one of the variables needed for gradient computation has been modified by an inplace operation",
        ),
        ("cast", "StateError: parameter 'scale' no longer lies in zeroopt's storage"),
        ("moved before step", "StateError: parameter 'scale' no longer lies in zeroopt's storage"),
        ("replaced", "StateError: parameter 'layers.0.weight' is no longer part of the model"),
        ("only no_sync", "StateError: the last backward ran under no_sync()"),
        ("inner step", "StateError: this AdamW was wrapped by zeroopt.wrap"),
        ("sparse", "StateError: parameter 'layers.0.weight' has a sparse gradient"),
    ],
)
def test_mistakes_are_named(run_on_ranks: RunOnRanks, how: str, expected: str) -> None:
    for message in run_on_ranks(2, go_wrong, how):
        assert message.startswith(expected), message


def most_buffers_in_use(order: str, options: dict[str, Any]) -> tuple[int, int]:
    """Full gradient buffers that stage 2 has lent at once, and gradients that had to wait for one in `param.grad`."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))
    model, _ = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=2, bucket_mb=0.01, **options)
    reducer = model._reducer
    lent, waiting = [], []
    take_up = reducer.take_up

    def count(index: int) -> None:
        take_up(index)
        lent.append(sum(store.full is not None for store in reducer.stores))
        waiting.append(sum(type(param.grad) is Tensor for param in net.parameters()))

    reducer.take_up = count
    x = torch.randn(2, 64)
    if order == "as planned":
        model(x).sum().backward()
    elif order == "foretold":  # gradients arrive in the order of the modules, the reverse of the plan
        sum(layer(x).sum() for layer in reversed(net)).backward()
    else:  # likewise, and no module is called
        sum((x @ layer.weight).sum() for layer in reversed(net)).backward()
    return max(lent), max(waiting)


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
@pytest.mark.parametrize(("options", "buffers"), [({}, 2), ({"bucket_buffers": 4}, 4), ({"overlap": False}, 1)])
def test_stage_2_lends_a_bounded_number_of_buffers(
    run_on_ranks: RunOnRanks, transport: str, options: dict[str, Any], buffers: int
) -> None:
    for lent, waiting in run_on_ranks(2, most_buffers_in_use, "as planned", {"transport": transport, **options}):
        assert lent <= buffers
        assert waiting <= 1
    if options.get("overlap", True):  # else buckets are never planned anew
        for lent, waiting in run_on_ranks(2, most_buffers_in_use, "foretold", {"transport": transport, **options}):
            assert lent <= buffers
            assert waiting <= 1
    for lent, waiting in run_on_ranks(2, most_buffers_in_use, "reverse", {"transport": transport, **options}):
        assert lent <= buffers
        assert waiting >= 12 - buffers - 1


def forget_a_reduce_in_flight() -> list[Tensor]:
    """A backward without a step, whose model is dropped, must not disturb what the group does next."""
    torch.manual_seed(0)
    for step in (False, False, True):
        net = nn.Linear(512, 512)
        model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()))
        if dist.get_rank() == 1:
            time.sleep(0.2)  # rank 0 has dropped its model by then
        model(torch.ones(2, 512)).sum().backward()
        if step:
            optimizer.step()
            return snapshot(net)
        del net, model, optimizer
        gc.collect()
    raise AssertionError("not reached")


def test_a_model_may_be_dropped_after_backward(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, forget_a_reduce_in_flight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def models_twice() -> bool:
    """All models of the parity tests can be wrapped next to each other."""
    wrapped = [zeroopt.wrap(net, optimizer_for("adamw", net)) for net in map(build, MODELS)]
    for name, (model, optimizer) in zip(MODELS, wrapped, strict=True):
        loss_of(model(batch(name, 0))).backward()
        optimizer.step()
    return True


def test_several_wrapped_models(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, models_twice) == [True, True]


def trained_in_stripes(options: dict[str, Any]) -> tuple[list[Tensor], list[int], int]:
    """Parameters after steps with accumulation and a parameter that one rank does not use, and the stripes of each bucket."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(300, 24), nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 3))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.01), **options)
    rank = dist.get_rank()
    for step in range(4):
        for part in range(2):
            torch.manual_seed(100 * step + 10 * part + rank)
            tokens = torch.randint(300, (6,))
            out = model(tokens) if step % 2 or rank else net[3](net[2](torch.randn(6, 40)))
            out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    reducer = model.replica.reducer
    largest = max((raw.nbytes for raw in reducer._pool.idle), default=0) if reducer._pool else 0
    return [param.detach().clone() for param in net.parameters()], [len(s.stripes) for s in reducer.stores], largest


# A buffer is smaller than one parameter, and holds several others.
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_parameter_larger_than_a_buffer_travels_in_stripes(run_on_ranks: RunOnRanks, world_size: int) -> None:
    variants: list[dict[str, Any]] = [
        {"bucket_buffers": 3},
        {"overlap": False},
        {"transport": "pairwise"},
        {"check_every": 2},
        {"reduce_dtype": torch.float32},
    ]
    whole = run_on_ranks(world_size, trained_in_stripes, {"bucket_mb": 25})[0][0]
    for options in ({}, *variants):
        for params, stripes, largest in run_on_ranks(world_size, trained_in_stripes, {"bucket_mb": 0.002, **options}):
            assert 1 in stripes and max(stripes) > 5
            assert largest <= 0.002 * 2**20 + world_size * 32 * 4
            for one, other in zip(params, whole, strict=True):
                assert torch.equal(one, other)
