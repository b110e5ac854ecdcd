"""Buckets are planned once more before the first step, in the order in which gradients arrived on rank 0, and never again."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from lone import LAYERS, WIDTH, Lone
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.feature import Step
from zeroopt.features.captures import Captures
from zeroopt.features.replanning import Replanning
from zeroopt.state.layout import ShardLayout

STAGES = (0, 1, 2)


class Backwards(nn.Sequential):
    """Runs its layers in the reverse of the order in which they are registered."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self):
            x = layer(x)
        return x


class Scene(Lone):
    """In one process, which plans nothing anew by itself: `replanning` is told of steps by hand."""

    def __init__(self, stage: int = 1, *, allowed: bool = True) -> None:
        super().__init__(stage, lambda params, lr: torch.optim.SGD(params, lr, momentum=0.5))
        self.captures = Captures(torch.device("cpu"), Mock())
        self.replanning = Replanning(self.optimizer._trained, None, self.captures, allowed=allowed)

    def backward_in(self, order: list[int]) -> None:
        """Gradients of layers come in this order."""
        x = torch.ones(2, WIDTH)
        for layer in reversed(order):
            x = self.net[layer](x)
        x.square().mean().backward()

    def begin_step(self) -> None:
        step: Any = Step(0, 1, [], [], [], lambda: torch.zeros(0))
        self.replanning.may_move(step)
        assert step.stores == self.optimizer._trained.stores

    def layers(self) -> list[str]:
        """In the order in which their buckets travel."""
        names = [managed.name for bucket in self.replica.buckets for managed in bucket.params]
        return list(dict.fromkeys(name.partition(".")[0] for name in names))


PLANNED = [str(layer) for layer in reversed(range(LAYERS))]


@pytest.mark.parametrize("stage", STAGES)
def test_buckets_follow_the_order_of_gradients_and_keep_what_is_in_them(stage: int) -> None:
    scene = Scene(stage)
    scene.step()
    scene.backward_in([1, 3, 0, 2])
    before = [param.detach().clone() for param in scene.net.parameters()]
    grads = [scene.optimizer.full_grad(param) for param in scene.net.parameters()]
    state = str(scene.whole_state())
    assert scene.layers() == PLANNED
    scene.begin_step()
    assert scene.layers() == ["1", "3", "0", "2"]
    assert scene.optimizer._trained.buckets == scene.replica.buckets
    assert scene.optimizer._trained.generations == [[3, 2, 7, 6, 1, 0, 5, 4]]
    assert all(map(torch.equal, scene.net.parameters(), before))
    assert all(map(torch.equal, [scene.optimizer.full_grad(p) for p in scene.net.parameters()], grads))  # type: ignore[arg-type]
    assert str(scene.whole_state()) == state
    scene.optimizer.step()


def test_it_happens_once_and_again_when_parameters_have_come_or_gone() -> None:
    scene = Scene()
    scene.backward_in([1, 3, 0, 2])
    scene.begin_step()
    scene.backward_in([0, 1, 2, 3])
    scene.begin_step()
    assert scene.layers() == ["1", "3", "0", "2"]
    scene.replanning.expect_new_order()
    scene.begin_step()
    assert scene.layers() == ["1", "3", "0", "2"], "no backward since"
    scene.backward_in([0, 1, 2, 3])
    scene.begin_step()
    assert scene.layers() == ["0", "1", "2", "3"]


@pytest.mark.parametrize("why", ["not allowed", "no backward"])
def test_what_says_nothing_of_the_order_is_not_gone_by(why: str) -> None:
    scene = Scene(allowed=why != "not allowed")
    if why != "no backward":
        scene.backward_in([1, 3, 0, 2])
    scene.begin_step()
    assert scene.layers() == PLANNED
    if why != "not allowed":
        scene.backward_in([1, 3, 0, 2])
        scene.begin_step()
        assert scene.layers() == ["1", "3", "0", "2"], "but the next step is"


def test_an_order_that_was_right_moves_nothing() -> None:
    scene = Scene()
    buckets = list(scene.replica.buckets)
    scene.backward_in([3, 2, 1, 0])
    scene.begin_step()
    assert scene.replica.buckets == buckets


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_that_a_cuda_graph_reads_stay(stage: int, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(stage)
    addresses = [param.data_ptr() for param in scene.net.parameters()]
    scene.captures.exist = True
    scene.backward_in([1, 3, 0, 2])
    with caplog.at_level(logging.WARNING, "zeroopt"):
        scene.begin_step()
        scene.backward_in([1, 3, 0, 2])
        scene.begin_step()
    assert scene.layers() == PLANNED
    assert [param.data_ptr() for param in scene.net.parameters()] == addresses
    (message,) = caplog.messages
    assert message.startswith("a CUDA graph was captured before the first step") and "after two steps" in message
    scene.optimizer.step()


def test_what_did_not_come_comes_last() -> None:
    scene = Scene()
    scene.backward_in([0, 2])
    scene.begin_step()
    assert scene.layers() == ["0", "2", "3", "1"]


def test_a_new_plan_is_told(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    with caplog.at_level(logging.DEBUG, "zeroopt"):
        scene.backward_in([1, 3, 0, 2])
        scene.begin_step()
    (line,) = (line for line in caplog.messages if "planned anew" in line)
    assert "the first was of 3." in line and "and will be of 1." in line


def test_a_bucket_that_all_parameters_have_left_goes() -> None:
    scene = Scene()
    gone = set(scene.net[3].parameters())
    for group in scene.optimizer.param_groups:
        group["params"] = [param for param in group["params"] if param not in gone]
    scene.optimizer.take_up_groups()
    assert not scene.replica.buckets[0].params
    scene.backward_in([1, 3, 0, 2])
    scene.begin_step()
    assert all(bucket.params for bucket in scene.replica.buckets) and scene.layers() == ["1", "0", "2"]


def layout_of(scene: Scene, order: list[list[int]]) -> ShardLayout:
    """Of a shard that was saved with another order."""
    layout = ShardLayout.of(scene.optimizer.state_dict())
    assert layout is not None
    return replace(layout, order=order)


def test_state_that_fits_as_it_is_changes_no_plan() -> None:
    scene = Scene()
    scene.step()
    buckets = list(scene.replica.buckets)
    layout = ShardLayout.of(scene.optimizer.state_dict())
    for one in (layout, None):
        scene.replanning.follow_order(one)
        assert scene.replica.buckets == buckets


@pytest.mark.parametrize("order", [[], [[0, 1, 2]], [[0, 0, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]], ids=str)
def test_an_order_of_other_parameters_is_not_followed(order: list[list[int]]) -> None:
    scene = Scene()
    scene.step()
    buckets = list(scene.replica.buckets)
    scene.replanning.follow_order(layout_of(scene, order))
    assert scene.replica.buckets == buckets


def ranks_arrive_differently() -> list[str]:
    """Rank 1 uses the layers in another order; rank 0's counts."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    _, optimizer = zeroopt.wrap(layers, torch.optim.AdamW(layers.parameters()), bucket_mb=0.001)
    ordered = list(layers) if dist.get_rank() == 1 else [layers[2], layers[0], layers[3], layers[1]]
    for _ in range(2):
        x = torch.ones(2, 16)
        for layer in ordered:
            x = layer(x)
        x.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [bucket.params[0].name.partition(".")[0] for bucket in optimizer._trained.buckets]


def test_rank_0_decides(run_on_ranks: RunOnRanks) -> None:
    for names in run_on_ranks(2, ranks_arrive_differently):
        assert list(dict.fromkeys(names)) == ["1", "3", "0", "2"]


def replans_in(steps: int, options: dict[str, Any]) -> list[bool]:
    """In which steps the buckets change."""
    torch.manual_seed(0)
    net = Backwards(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.0003, **options)
    changed = []
    for _ in range(steps):
        before = list(optimizer._trained.buckets)
        model(torch.ones(2, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        changed.append(optimizer._trained.buckets != before)
    return changed


def test_ranks_do_so_once_after_the_first_step(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, replans_in, 3, {}) == [[True, False, False]] * 2
    assert run_on_ranks(2, replans_in, 3, {"overlap": False}) == [[False] * 3] * 2


def test_a_process_alone_does_not() -> None:
    """It waits for nobody."""
    assert replans_in(3, {}) == [False] * 3
