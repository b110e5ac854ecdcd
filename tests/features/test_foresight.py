"""Forwards are watched until the next backward begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from zeroopt.collectives.lone import lone_group
from zeroopt.collectives.single import SingleTransport
from zeroopt.features.foresight import Foresight
from zeroopt.plan.params import ManagedParam


class Scene:
    def __init__(self) -> None:
        self.net = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        named = list(self.net.named_parameters())
        self.params = [ManagedParam(name, param, i, 0, i) for i, (name, param) in enumerate(named)]
        self.told: list[list[int]] = []
        self.foresight = Foresight(self.net, SingleTransport(lone_group()))

    def tell(self, order: Sequence[int]) -> None:
        assert not torch.is_grad_enabled()
        self.told.append(list(order))

    def forward(self, *order: int) -> None:
        for index in order:
            self.net[index](torch.ones(2))

    @property
    def is_watching(self) -> bool:
        return any(part._forward_pre_hooks for part in self.net.modules())


def test_the_next_backward_is_told_what_to_expect() -> None:
    scene = Scene()
    scene.forward(0)
    scene.foresight.backward_begins()
    assert not scene.told and not scene.is_watching, "nobody has asked"
    scene.foresight.watch(scene.params, scene.tell)
    scene.forward(1, 2, 0)
    scene.forward(0, 1)
    scene.foresight.backward_begins()
    assert scene.told == [[0, 2, 1]] and not scene.is_watching
    scene.forward(2)
    scene.foresight.backward_begins()
    assert len(scene.told) == 1


def test_asked_again_it_begins_anew() -> None:
    scene = Scene()
    scene.foresight.watch(scene.params, scene.tell)
    scene.forward(1)
    scene.foresight.watch(scene.params, scene.tell)
    scene.forward(2, 0)
    scene.foresight.backward_begins()
    assert scene.told == [[0, 2, 1]], "what was not used comes last"


def test_it_can_be_told_to_forget() -> None:
    scene = Scene()
    scene.foresight.watch(scene.params, scene.tell)
    scene.foresight.forget()
    assert not scene.is_watching
    scene.forward(1)
    scene.foresight.backward_begins()
    assert not scene.told
