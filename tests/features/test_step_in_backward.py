"""Stepping buckets while backward runs: the bits of the ordinary step, no gradients in memory, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lone import WIDTH, Lone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import OPTIMIZERS, Halves, SignMomentum, batch, build, loss_of, optimizer_for, restore, snapshot
from transports import hosts
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import ConfigError, NotSupportedError, StateError
from zeroopt.collectives import Wire
from zeroopt.storage.bucket import Bucket
from zeroopt.storage.gradient_store import GradientStore

BF16 = torch.bfloat16
SMALL: dict[str, Any] = {"stage": 2, "bucket_mb": 0.002}
SIB = {"step_in_backward": True}
LEAST: dict[str, Any] = {
    "param_dtype": BF16,
    "master_weights": "remainder",
    "state_dtype": torch.int8,
    "cast_inputs": True,
}

# The bits of the ordinary step.

Result = tuple[list[list[Tensor]], Any]


def whole_state(optimizer: zeroopt.ZeroOptimizer) -> Any:
    """What the plain torch optimizer would have; the same on all ranks."""
    states = []
    for to in range(dist.get_world_size()):
        optimizer.consolidate_state_dict(to)
        states.append(optimizer.full_state_dict() if dist.get_rank() == to else None)
    return states[dist.get_rank()]


def train(model: str, optimizer: str, options: dict[str, Any], steps: int = 3, groups: int = 1) -> Result:
    net = build(model)
    wrapped, one = zeroopt.wrap(net, optimizer_for(optimizer, net, groups), **{**SMALL, **options})
    schedule = torch.optim.lr_scheduler.ExponentialLR(one, 0.5)
    history = []
    for step in range(steps):
        loss_of(wrapped(batch(model, step))).backward()
        one.step()
        schedule.step()
        one.zero_grad()
        history.append(snapshot(net))
    return history, whole_state(one)


def train_both(model: str, optimizer: str, options: dict[str, Any], groups: int = 1) -> list[Result]:
    return [train(model, optimizer, {**options, **more}, groups=groups) for more in ({}, SIB)]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, others in zip(one, other, strict=True):
            assert_same(mine, others)
    else:
        assert one == other


def assert_same_on_ranks(results: Sequence[Sequence[Any]]) -> None:
    for ordinary, in_backward in results:
        assert_same(in_backward, ordinary)


WAYS: list[dict[str, Any]] = [
    {},
    {"fused": False},
    {"overlap": False},
    {"bucket_buffers": 1},
    {"bucket_buffers": 4},
    {"share_parameters": True},
    {"share_parameters": True, "fused": False},
    {"transport": "pairwise"},
    {"transport": "torch"},
    {"reduce_dtype": BF16},
    {"wire": Wire(torch.float16)},
    {"state_dtype": BF16},
    LEAST,
    {**LEAST, "share_parameters": True},
    {**LEAST, "master_weights": "float32", "transport": "pairwise"},
    {**LEAST, "master_weights": "none"},
]


@pytest.mark.parametrize("options", WAYS, ids=lambda options: ", ".join(map(str, options)))
@pytest.mark.parametrize(("model", "world_size"), [("mlp", 4), ("lm", 2)])
def test_bits_are_those_of_the_ordinary_step(
    run_on_ranks: RunOnRanks, model: str, world_size: int, options: dict[str, Any]
) -> None:
    assert_same_on_ranks(run_on_ranks(world_size, train_both, model, "adamw", options, 2))


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize(("model", "world_size"), [("conv", 2), ("mlp", 1), ("conv", 3)])
def test_with_buffers_alone_and_on_three_ranks(
    run_on_ranks: RunOnRanks, model: str, world_size: int, options: dict[str, Any]
) -> None:
    assert_same_on_ranks(run_on_ranks(world_size, train_both, model, "adamw", options))


def train_both_over_hosts(options: dict[str, Any]) -> list[Result]:
    with hosts([0, 0, 1, 1]):
        return train_both("mlp", "adamw", options)


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}], ids=str)
def test_over_several_hosts(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    assert_same_on_ranks(run_on_ranks(4, train_both_over_hosts, options))


OWN_STEP = [name for name in OPTIMIZERS if name != "own"]
WITH_KERNEL = [name for name in OWN_STEP if name.startswith(("sgd", "adam_", "adamw", "adagrad", "rmsprop"))]


@pytest.mark.parametrize(
    ("optimizer", "fused"), [*((name, False) for name in OWN_STEP), *((name, True) for name in WITH_KERNEL)]
)
def test_optimizers_of_torch(run_on_ranks: RunOnRanks, optimizer: str, fused: bool) -> None:
    assert_same_on_ranks(run_on_ranks(2, train_both, "mlp", optimizer, {"fused": fused}))


def train_whole(make: Callable[..., torch.optim.Optimizer], options: dict[str, Any]) -> list[Tensor]:
    net = build("mlp")
    wrapped, optimizer = zeroopt.wrap(net, make(net.parameters()), **{**SMALL, **options})
    for step in range(3):
        loss_of(wrapped(batch("mlp", step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


def train_whole_both(make: Callable[..., torch.optim.Optimizer]) -> list[list[Tensor]]:
    return [train_whole(make, options) for options in ({}, SIB)]


@pytest.mark.parametrize(
    "make",
    [
        zeroopt.optim.FusedLAMB,
        torch.optim.ASGD,
        *([torch.optim.Adafactor] if hasattr(torch.optim, "Adafactor") else []),  # torch 2.5 has it
    ],
)
def test_optimizers_that_step_whole_parameters(
    run_on_ranks: RunOnRanks, make: Callable[..., torch.optim.Optimizer]
) -> None:
    assert_same_on_ranks(run_on_ranks(2, train_whole_both, make))


class Backwards(nn.Sequential):
    """Runs its layers in the reverse of the order in which they are registered, so that buckets are planned anew."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self):
            x = torch.tanh(layer(x))
        return x


def train_backwards(options: dict[str, Any]) -> tuple[list[Tensor], bool]:
    torch.manual_seed(0)
    net = Backwards(*(nn.Linear(9, 9) for _ in range(6)))
    model, optimizer = zeroopt.wrap(
        net, torch.optim.Adam(net.parameters(), lr=0.1), stage=2, bucket_mb=0.0005, **options
    )
    before = [bucket.params[0].name for bucket in optimizer.replica.buckets]
    for step in range(3):
        model(torch.randn(2, 9, generator=torch.Generator().manual_seed(7 * step + dist.get_rank()))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net), before != [bucket.params[0].name for bucket in optimizer.replica.buckets]


def train_backwards_both(options: dict[str, Any]) -> list[tuple[list[Tensor], bool]]:
    return [train_backwards({**options, **more}) for more in ({}, SIB)]


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}, LEAST], ids=lambda options: ", ".join(options))
def test_buckets_that_are_planned_anew(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    results = run_on_ranks(2, train_backwards_both, options)
    assert_same_on_ranks(results)
    assert all(planned_anew for both in results for _, planned_anew in both)


def train_halves(how: str, options: dict[str, Any]) -> Result:
    """Each rank uses one half, or none, or both use the same."""
    torch.manual_seed(0)
    net = Halves()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    model, one = zeroopt.wrap(net, optimizer, stage=2, bucket_mb=0.0003, **options)
    history = []
    for step in range(5):
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        x[0, 0] = 1.0 if (step + (dist.get_rank() if how == "differ" else 0)) % 2 else -1.0
        if not (how == "one rank has no backward" and dist.get_rank() == step % 2):
            model(x).square().mean().backward()
        one.step()
        one.zero_grad(set_to_none=how != "gradients of zero")
        history.append(snapshot(net))
    return history, whole_state(one)


def train_halves_both(how: str, options: dict[str, Any]) -> list[Result]:
    return [train_halves(how, {**options, **more}) for more in ({}, SIB)]


@pytest.mark.parametrize(
    "options", [{}, {"share_parameters": True}, {"fused": False}, {"transport": "pairwise"}], ids=str
)
@pytest.mark.parametrize("how", ["differ", "alike", "one rank has no backward", "gradients of zero"])
def test_parameters_that_are_not_used_stay(run_on_ranks: RunOnRanks, how: str, options: dict[str, Any]) -> None:
    assert_same_on_ranks(run_on_ranks(2, train_halves_both, how, options))


def train_with_two(options: dict[str, Any]) -> list[list[Tensor]]:
    net = build("mlp")
    params = list(net.parameters())
    model, first = zeroopt.wrap(net, torch.optim.AdamW(params[::2], lr=0.01), **{**SMALL, **options})
    model, second = zeroopt.wrap(model, torch.optim.SGD(params[1::2], lr=0.1, momentum=0.9), **{**SMALL, **options})
    history = []
    for step in range(4):
        loss_of(model(batch("mlp", step))).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        history.append(snapshot(net))
    return history


def train_with_two_both() -> list[list[list[Tensor]]]:
    return [train_with_two(options) for options in ({}, SIB)]


def test_two_optimizers(run_on_ranks: RunOnRanks) -> None:
    assert_same_on_ranks(run_on_ranks(2, train_with_two_both))


def train_halves_with_two(options: dict[str, Any]) -> list[list[Tensor]]:
    """In each backward, all ranks use the parameters of one of two optimizers, or none does."""
    torch.manual_seed(0)
    net = Halves()
    model: nn.Module = net
    optimizers = []
    for half in (net.up, net.down):
        model, optimizer = zeroopt.wrap(model, torch.optim.AdamW(half.parameters(), lr=0.1), stage=2, **options)
        optimizers.append(optimizer)
    history = []
    for step in range(5):
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        x[0, 0] = 1.0 if step % 2 else -1.0
        if step != 2:
            model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        history.append(snapshot(net))
    return history


def train_halves_with_two_both() -> list[list[list[Tensor]]]:
    return [train_halves_with_two(options) for options in ({}, SIB)]


def test_an_optimizer_whose_parameters_were_not_used(run_on_ranks: RunOnRanks) -> None:
    assert_same_on_ranks(run_on_ranks(2, train_halves_with_two_both))


def train_and_unfreeze(options: dict[str, Any]) -> Result:
    net = build("mlp")
    frozen = list(net.parameters())[:2]
    for param in frozen:
        param.requires_grad_(False)
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), **{**SMALL, **options})
    history = []
    for step in range(4):
        if step == 2:
            for param in frozen:
                param.requires_grad_(True)
        loss_of(model(batch("mlp", step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(snapshot(net))
    return history, whole_state(optimizer)


def train_and_unfreeze_both() -> list[Result]:
    return [train_and_unfreeze(options) for options in ({}, SIB)]


def test_parameters_that_are_unfrozen(run_on_ranks: RunOnRanks) -> None:
    assert_same_on_ranks(run_on_ranks(2, train_and_unfreeze_both))


def go_on_from(options: list[dict[str, Any]]) -> list[Tensor]:
    """Two steps with each of these options, each begun from the state of the one before."""
    values, state = snapshot(build("mlp")), None
    for number, each in enumerate(options):
        net = build("mlp")
        restore(net, values)
        model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), **{**SMALL, **each})
        if state is not None:
            optimizer.load_state_dict(state)
        for step in range(2):
            loss_of(model(batch("mlp", 2 * number + step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        values, state = snapshot(net), whole_state(optimizer)
    return values


def go_on_in_ways() -> list[list[Tensor]]:
    return [go_on_from(options) for options in ([{}, {}, {}], [SIB, {}, SIB])]


def test_state_goes_from_one_way_to_the_other(run_on_ranks: RunOnRanks) -> None:
    assert_same_on_ranks(run_on_ranks(2, go_on_in_ways))


def train_checkpointed(options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
    model, optimizer = zeroopt.wrap(Checkpointed(net), torch.optim.AdamW(net.parameters()), **{**SMALL, **options})
    for step in range(3):
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


class Checkpointed(nn.Module):
    """Runs its layers again during backward, and uses one of them twice."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=False)
        return x


def train_checkpointed_both(more: dict[str, Any]) -> list[list[Tensor]]:
    return [train_checkpointed({**more, **options}) for options in ({}, SIB)]


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}], ids=str)
def test_activations_that_are_computed_again(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    assert_same_on_ranks(run_on_ranks(3, train_checkpointed_both, options))


def train_with_slow_ranks(options: dict[str, Any]) -> list[list[Tensor]]:
    """One rank after the other is slow in the middle of backward, and in forward."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(24, 24) for _ in range(5)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.05), **{**SMALL, **options})
    history = []
    for step in range(4):
        pause = 0.02 * (step % dist.get_world_size() == dist.get_rank())
        handles = [
            net[3].register_full_backward_hook(lambda *_, pause=pause: time.sleep(pause)),
            net[1].register_forward_hook(lambda *_, pause=pause: time.sleep(pause)),
        ]
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(x.requires_grad_()).square().mean().backward()
        time.sleep(pause)
        optimizer.step()
        optimizer.zero_grad()
        history.append(snapshot(net))
        for handle in handles:
            handle.remove()
    return history


def train_with_slow_ranks_both(more: dict[str, Any]) -> list[list[list[Tensor]]]:
    return [train_with_slow_ranks({**more, **options}) for options in ({}, SIB)]


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}, {"transport": "pairwise"}], ids=str)
def test_nobody_writes_what_a_slow_rank_still_reads(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    assert_same_on_ranks(run_on_ranks(3, train_with_slow_ranks_both, options))


# What a step still does, and when.


class Scene(Lone):
    def __init__(self, make: Any = torch.optim.SGD, **options: Any) -> None:
        super().__init__(2, make, **{**SIB, **options})

    def values(self) -> list[Tensor]:
        return snapshot(self.net)


def test_backward_steps_and_step_only_counts() -> None:
    scene = Scene(torch.optim.AdamW)
    before = scene.values()
    scene.backward()
    stepped = scene.values()
    assert not any(map(torch.equal, before, stepped))
    assert all(entry["step"] == 1 for entry in scene.whole_state().values())
    scene.optimizer.step()
    assert_same(scene.values(), stepped)
    assert all(entry["step"] == 1 for entry in scene.whole_state().values())
    assert scene.replica.reducer.num_steps == 1


def test_hooks_schedulers_and_closures_see_one_step() -> None:
    scene = Scene()
    calls: list[str] = []
    scene.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    scene.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedule = torch.optim.lr_scheduler.StepLR(scene.optimizer, 1, gamma=0.1)

    def closure() -> float:
        scene.optimizer.zero_grad()
        scene.backward()
        return 1.5

    before = scene.values()
    assert scene.optimizer.step(closure) == 1.5
    schedule.step()
    assert calls == ["before", "after"]
    assert not any(map(torch.equal, before, scene.values()))
    assert scene.optimizer.param_groups[0]["lr"] == 0.05


def test_features_see_sums_before_they_are_stepped_and_steps_after() -> None:
    class Halving(zeroopt.Feature):
        steps = 0

        def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
            store.reduced.mul_(0.5)

        def after_step(self, step: Any) -> None:
            self.steps += int(step.active.sum()) == 8

    halving = Halving()
    scene, half = Scene(), Scene(features=[halving])
    before = scene.values()
    scene.step()
    half.step()
    for start, whole, halved in zip(before, scene.values(), half.values(), strict=True):
        torch.testing.assert_close(halved - start, (whole - start) / 2)
    assert halving.steps == 1


def test_what_masters_are_rounded_from_follows_writes() -> None:
    ordinary, in_backward = (
        Lone(2, torch.optim.AdamW, param_dtype=BF16, cast_inputs=True, fused="auto"),
        Scene(torch.optim.AdamW, param_dtype=BF16, cast_inputs=True, fused="auto"),
    )
    for scene in (ordinary, in_backward):
        scene.step(0)
        with torch.no_grad():
            scene.net[1].weight.mul_(3.0)
        scene.step(1)
    assert_same(snapshot(in_backward.net), snapshot(ordinary.net))


# Memory.


def held_for_gradients(options: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of sums and of full buffers that stores hold after some steps; and of the largest slice."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=2, bucket_mb=0.0001, **options)
    for step in range(3):
        loss_of(model(batch("mlp", step))).backward()
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
    stores = optimizer.replica.reducer.stores
    assert len(stores) > 4
    sums = {store.reduced.untyped_storage().data_ptr(): store.reduced.untyped_storage().nbytes() for store in stores}
    lent = sum(store.full is not None for store in stores)
    optimizer.step()
    return sum(sums.values()), lent, max(store.reduced.nbytes for store in stores)


@pytest.mark.parametrize(
    "options", [{}, {"share_parameters": True}, LEAST, {"transport": "pairwise"}, {"fused": False}]
)
def test_all_sums_lie_in_the_memory_of_one(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    for held, lent, largest in run_on_ranks(2, held_for_gradients, {**options, **SIB}):
        assert held == largest
        assert lent <= 2


def test_the_log_counts_the_gradients_of_one_bucket(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "zeroopt"):
        scene = Scene()
    largest = max(bucket.padded_numel for bucket in scene.replica.buckets)
    assert f"gradients {4 * largest / 1e6:.1f} MB in sums" in caplog.text


# Refused with options and with optimizers: nothing has been changed.


@pytest.mark.parametrize("stage", [0, 1])
def test_it_needs_stage_2(stage: int) -> None:
    with pytest.raises(ConfigError, match=f"step_in_backward=True needs stage 2, got stage={stage}"):
        Lone(stage, **SIB)


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 1.0}, {"check_every": 3}, {"average_every": 2}, {"param_dtype": torch.float16}],
    ids=str,
)
def test_options_that_need_all_gradients(options: dict[str, Any]) -> None:
    with pytest.raises(
        NotSupportedError, match=f"^{next(iter(options))}=.* needs the gradients of a whole step together"
    ):
        Scene(**options)


def test_optimizers_that_may_count_steps() -> None:
    with pytest.raises(NotSupportedError, match="SignMomentum may count steps .* torch.optim or zeroopt.optim"):
        Scene(SignMomentum)
    Lone(2, SignMomentum).step()


@pytest.mark.parametrize("name", ["before_step", "on_gradients", "stepped", "unscaling"])
def test_features_that_take_part_in_what_no_longer_happens(name: str) -> None:
    feature = type("Mine", (zeroopt.Feature,), {name: lambda self, *_: None})()
    with pytest.raises(NotSupportedError, match=rf"Mine.{name}\(\) comes when all gradients are there"):
        Scene(features=[feature])


# Refused where it is called.


def unscale(scene: Scene) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(scene.optimizer)


def step_scaled(scene: Scene) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(scene.optimizer)


def run_unsynchronised(scene: Scene) -> None:
    with scene.model.no_sync():
        pass


def join(scene: Scene) -> None:
    with scene.model.join():
        pass


WEIGHT: Callable[[Scene], Any] = lambda scene: scene.net[0].weight


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("clip_grad_norm_()", lambda scene: scene.optimizer.clip_grad_norm_(1.0)),
        ("grad_norm", lambda scene: scene.optimizer.grad_norm),
        ("full_grad()", lambda scene: scene.optimizer.full_grad(WEIGHT(scene))),
        ("a GradScaler", step_scaled),
        ("no_sync()", run_unsynchronised),
        ("join()", join),
        ("using param.grad", unscale),
        ("using param.grad", lambda scene: nn.utils.clip_grad_norm_(scene.net.parameters(), 1.0)),
        ("using param.grad", lambda scene: nn.utils.clip_grad_value_(scene.net.parameters(), 1.0)),
        ("using param.grad", lambda scene: WEIGHT(scene).grad.norm()),
        ("using param.grad", lambda scene: WEIGHT(scene).grad.mul_(2.0)),
        ("using param.grad", lambda scene: WEIGHT(scene).grad.add_(1.0)),
        ("using param.grad", lambda scene: setattr(WEIGHT(scene).grad, "data", torch.zeros(WIDTH, WIDTH))),
    ],
)
def test_what_needs_all_gradients(what: str, call: Callable[[Scene], object]) -> None:
    scene = Scene()
    scene.backward()
    with pytest.raises(NotSupportedError) as caught:
        call(scene)
    assert str(caught.value).startswith(f"{what} needs the gradients of a whole step together")
    assert "step_in_backward=False" in str(caught.value)


def test_several_backward_passes_a_step() -> None:
    scene = Scene()
    scene.backward(0)
    values = scene.values()
    with pytest.raises(StateError, match=r"before step\(\) was called for the one before.* step_in_backward=False"):
        scene.backward(1)
    assert_same(scene.values(), values)
    scene.optimizer.step()
    scene.optimizer.zero_grad()
    scene.backward(1)
    assert not any(map(torch.equal, scene.values(), values)), "training goes on"


@pytest.mark.parametrize("forget", ["step", "other step"])
def test_a_step_that_was_left_out(forget: str) -> None:
    net = build("mlp")
    params = list(net.parameters())
    options = {**SMALL, **SIB}
    model, first = zeroopt.wrap(net, torch.optim.SGD(params[::2], lr=0.1), **options)
    model, second = zeroopt.wrap(model, torch.optim.SGD(params[1::2], lr=0.1), **options)
    model(torch.ones(1, 7)).sum().backward()
    (second if forget == "step" else first).step()
    model.zero_grad()
    with pytest.raises(StateError, match=r"before step\(\) was called"):
        model(torch.ones(1, 7)).sum().backward()


def test_gradients_that_were_not_cleared() -> None:
    scene = Scene()
    scene.backward()
    scene.optimizer.step()
    values = scene.values()
    with pytest.raises(StateError, match=r"'0.weight' has not been cleared since the last step.* call zero_grad\(\)"):
        scene.backward()
    assert_same(scene.values(), values)
    for param in scene.net.parameters():
        param.grad = None
    scene.backward()
    assert not any(map(torch.equal, scene.values(), values))


@pytest.mark.parametrize("how", ["again", "without a backward"])
def test_steps_with_gradients_that_no_backward_has_left(how: str) -> None:
    scene = Scene()
    if how == "again":
        scene.backward()
        scene.optimizer.step()
    else:
        scene.net[0].weight.grad = torch.ones(WIDTH, WIDTH)
    values = scene.values()
    with pytest.raises(StateError, match="with step_in_backward=True only backward steps"):
        scene.optimizer.step()
    assert_same(scene.values(), values)


def test_a_step_without_any_gradient_does_nothing() -> None:
    scene = Scene()
    values = scene.values()
    scene.optimizer.step()
    scene.step()
    scene.optimizer.step()
    ordinary = Lone(2)
    ordinary.step()
    assert_same(scene.values(), snapshot(ordinary.net))
    assert not any(map(torch.equal, scene.values(), values))


def clear_all(scene: Scene) -> None:
    scene.optimizer.zero_grad()


def zero_all(scene: Scene) -> None:
    scene.model.zero_grad(set_to_none=False)


def clear_one(scene: Scene) -> None:
    scene.net[1].weight.grad = None


def replace_one(scene: Scene) -> None:
    scene.net[1].weight.grad = torch.ones(WIDTH, WIDTH)


@pytest.mark.parametrize("change", [clear_all, zero_all, clear_one, replace_one])
def test_gradients_that_were_changed_after_they_were_stepped(change: Callable[[Scene], None]) -> None:
    scene = Scene()
    scene.backward()
    change(scene)
    with pytest.raises(StateError, match=r"was cleared or replaced between backward and step\(\)"):
        scene.optimizer.step()


@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25)], ids=["a number", "a tensor"])
def test_options_that_were_changed_after_they_were_used(value: float | Tensor) -> None:
    scene = Scene()
    scene.optimizer.param_groups[0]["lr"] = torch.tensor(0.5) if isinstance(value, Tensor) else 0.5
    scene.backward()
    if isinstance(value, Tensor):
        scene.optimizer.param_groups[0]["lr"].copy_(value)
    else:
        scene.optimizer.param_groups[0]["lr"] = value
    with pytest.raises(StateError, match=r"options of param_groups were changed between backward and step\(\)"):
        scene.optimizer.step()


def test_groups_that_are_edited_at_the_wrong_time() -> None:
    scene = Scene()
    loss = scene.model(torch.ones(1, WIDTH)).sum()
    gone = scene.optimizer.param_groups[0]["params"].pop()
    values = scene.values()
    with pytest.raises(StateError, match="param_groups were edited between forward and backward"):
        loss.backward()
    assert_same(scene.values(), values)
    scene.optimizer.param_groups[0]["params"].append(gone)
    scene.backward()
    scene.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(StateError, match=r"taking up param_groups cannot be done between backward and step\(\)"):
        scene.optimizer.step()


# Parameters that are used after their gradient is ready.


class Late(nn.Module):
    """The last layer's weight is used by the first one as well, without a gradient."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        late = self.layers[2].weight
        x = self.layers[0](x)
        if self.how == "saved":
            x = nn.functional.linear(x, late.detach())
        elif self.how == "kept":
            x = _Kept.apply(x, [late])
        elif self.how == "hook":
            x.register_hook(lambda grad: grad * late.norm())
        else:
            x = checkpoint(lambda y: nn.functional.linear(y, late.detach()), x, use_reentrant=False)
        return self.layers[2](torch.tanh(x))


class _Kept(torch.autograd.Function):
    """Keeps a parameter where autograd does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: list[Tensor]) -> Tensor:
        (ctx.kept,) = weights
        return x @ ctx.kept.detach().t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.kept, None


def use_late(how: str, options: dict[str, Any]) -> str:
    torch.manual_seed(0)
    net = Late(how)
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=2, bucket_mb=1e-4, **options)
    try:
        model(torch.ones(2, WIDTH)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


LATE = {
    "saved": "modified by an inplace operation",
    "kept": "was used while backward runs",
    "hook": "was used while backward runs",
    "computed again": "was used while backward runs",
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("options", [{}, {"share_parameters": True}, {"overlap": False}], ids=str)
@pytest.mark.parametrize("how", LATE)
def test_parameters_that_are_used_after_their_gradient_is_ready(
    run_on_ranks: RunOnRanks, how: str, options: dict[str, Any], world_size: int
) -> None:
    assert run_on_ranks(world_size, use_late, how, options) == [""] * world_size
    for message in run_on_ranks(world_size, use_late, how, {**options, **SIB}):
        assert LATE[how] in message


def test_after_such_a_backward_parameters_are_not_to_be_used() -> None:
    net = Late("kept")
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), bucket_mb=1e-4, **SIB)
    with pytest.raises(StateError, match="was used while backward runs"):
        model(torch.ones(2, WIDTH)).sum().backward()
    with pytest.raises(StateError, match="start the job again from a checkpoint"):
        net.layers[2].weight.sum()
    with pytest.raises(StateError, match="start the job again from a checkpoint"):
        optimizer.step()


def test_a_gradient_that_arrives_twice() -> None:
    net = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = net[0]

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True)
            return x

    module = Twice()
    model, _ = zeroopt.wrap(module, torch.optim.SGD(module.parameters(), lr=0.1), **SIB)
    with pytest.raises(StateError, match="was used while backward runs|before step\\(\\) was called"):
        model(torch.ones(2, WIDTH, requires_grad=True)).sum().backward()
