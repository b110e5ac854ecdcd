"""The compiled hook counts what the one in Python does, and looks at what that does."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zeroopt import _C
from zeroopt.gradients.counting import ArrivalsInPython, CountingHookInPython

BUCKET_OF = [0, 1, 0, 2, 1, 0, 0, 1]
KINDS = {"python": (ArrivalsInPython, CountingHookInPython), "compiled": (_C.Arrivals, _C.CountingHook)}


class Scene:
    """Parameters in buckets, and what their hooks do."""

    def __init__(self, kind: str) -> None:
        make_arrivals, base = KINDS[kind]
        self.stream: object = 0
        self.arrivals: Any = make_arrivals()
        self.arrivals.bucket_of = BUCKET_OF
        self.arrivals.arrived = bytearray(len(BUCKET_OF))
        self.arrivals.missing = [BUCKET_OF.count(bucket) for bucket in range(3)]
        self.arrivals.order = []
        self.arrivals.last = [None] * 3
        self.arrivals.tell = self.tell
        self.arrivals.is_on = True
        self.calls: list[tuple[str, object]] = []
        calls = self.calls

        class Hook(base):  # type: ignore[misc, valid-type]
            def look(self, param: object) -> None:
                calls.append(("look", param))

            def complete(self, bucket: int) -> None:
                calls.append(("complete", bucket))

        self.hooks: list[Any] = [Hook() for _ in BUCKET_OF]
        for index, hook in enumerate(self.hooks):
            hook.arrivals, hook.index = self.arrivals, index

    def tell(self) -> object:
        return self.stream

    def come(self, index: int, num_hooks: int = 1) -> None:
        param: Any = SimpleNamespace(_post_accumulate_grad_hooks=dict.fromkeys(range(num_hooks)))
        self.hooks[index](param)
        self.calls[:] = [(name, index if what is param else what) for name, what in self.calls]

    def state(self) -> tuple[object, ...]:
        arrivals = self.arrivals
        return list(self.calls), bytes(arrivals.arrived), list(arrivals.order), list(arrivals.missing), arrivals.is_on


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest) -> Scene:
    return Scene(request.param)


def test_those_beside_others_on_one_stream_are_counted(scene: Scene) -> None:
    scene.arrivals.last[0] = 0
    for index in (2, 0, 6):
        scene.come(index)
    assert scene.state() == ([], bytes([1, 0, 1, 0, 0, 0, 1, 0]), [2, 0, 6], [1, 3, 1], True)
    scene.come(5)
    assert scene.calls == [("complete", 0)] and scene.arrivals.missing == [0, 3, 1]


def wait_for_none(scene: Scene) -> None:
    scene.arrivals.last[0] = None


def come_on_another_stream(scene: Scene) -> None:
    scene.stream = 7


def leave_local(scene: Scene) -> None:
    scene.arrivals.is_on = False


def come_twice(scene: Scene) -> None:
    scene.arrivals.arrived[0] = 1


@pytest.mark.parametrize("change", [wait_for_none, come_on_another_stream, leave_local, come_twice])
def test_all_others_are_looked_at_and_not_counted(scene: Scene, change: Callable[[Scene], None]) -> None:
    scene.arrivals.last[0] = 0
    change(scene)
    before = scene.state()[1:]
    scene.come(0)
    assert scene.calls == [("look", 0)] and scene.state()[1:] == before


def test_beside_hooks_of_the_user_each_is_looked_at(scene: Scene) -> None:
    scene.arrivals.last[0] = 0
    scene.come(0, num_hooks=2)
    assert scene.calls == [("look", 0)] and scene.arrivals.order == []


def test_one_that_was_looked_at_is_noted(scene: Scene) -> None:
    assert [scene.arrivals.note(index) for index in (0, 3, 2)] == [3, 0, 2]
    assert scene.arrivals.order == [0, 3, 2] and scene.arrivals.missing == [2, 3, 0]


def test_what_raises_is_passed_on(scene: Scene) -> None:
    def fail() -> object:
        raise RuntimeError("no stream")

    scene.arrivals.last[0] = 0
    scene.arrivals.tell = fail
    with pytest.raises(RuntimeError, match="no stream"):
        scene.come(0)
    assert scene.arrivals.order == []
    for method in (scene.arrivals.count, scene.arrivals.note):
        with pytest.raises(IndexError):
            method(99)


def test_autograd_calls_it(scene: Scene) -> None:
    scene.arrivals.last[:] = [0] * 3
    params = [torch.nn.Parameter(torch.ones(2)) for _ in BUCKET_OF]
    for param, hook in zip(params, scene.hooks, strict=True):
        param.register_post_accumulate_grad_hook(hook)
    sum(param.sum() for param in params).backward()  # type: ignore[union-attr]
    assert scene.arrivals.missing == [0, 0, 0] and sorted(bucket for _, bucket in scene.calls) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_both_do_the_same_whatever_happens(seed: int) -> None:
    draw = random.Random(seed)
    scenes = [Scene(kind) for kind in KINDS]
    for _ in range(60):
        index, bucket, stream = draw.randrange(len(BUCKET_OF)), draw.randrange(3), draw.choice([0, 0, 0, 1])
        last, is_on, num_hooks = draw.choice([None, 0, 0, 0, 1]), draw.random() < 0.9, draw.choice([1, 1, 1, 2])
        for scene in scenes:
            scene.stream = stream
            scene.arrivals.last[bucket] = last
            scene.arrivals.is_on = is_on
            scene.come(index, num_hooks)
        assert scenes[0].state() == scenes[1].state()
