"""In stage 0, `param.grad` is the parameter's part of its bucket, and what a user makes of it is taken up."""

from __future__ import annotations

import math

import pytest
import torch
from lone import Lone
from torch import Tensor

from zeroopt.gradients.norm_groups import NormGroups
from zeroopt.gradients.view import GradientView
from zeroopt.plan.params import ManagedParam
from zeroopt.storage.factors import scale_sums

NOWHERE = NormGroups([])


class Scene(Lone):
    """After a backward, unless it is to be a new one."""

    def __init__(self, *, trained: bool = True) -> None:
        super().__init__(stage=0)
        if trained:
            self.backward()

    @property
    def view(self) -> GradientView:
        return self.replica.reducer.view

    @property
    def params(self) -> list[ManagedParam]:
        return self.replica.params

    def own(self, managed: ManagedParam) -> Tensor:
        """A parameter's part of its bucket."""
        bucket = next(bucket for bucket in self.replica.buckets if managed in bucket.params)
        full = self.replica.reducer.stores[bucket.index].full
        assert full is not None
        return managed.view_in(full)

    def shows(self, managed: ManagedParam) -> bool:
        """Whether `param.grad` is that part."""
        grad = managed.param.grad
        return grad is not None and grad.data_ptr() == self.own(managed).data_ptr()


def test_after_a_backward_gradients_lie_in_the_buckets() -> None:
    scene = Scene()
    assert scene.view.is_plain and scene.view.waits
    assert all(map(scene.shows, scene.params))
    assert all(type(managed.param.grad) is Tensor for managed in scene.params)
    assert scene.view.take().tolist() == [1] * len(scene.params)


def test_what_was_cleared_is_known() -> None:
    scene = Scene()
    scene.params[1].param.grad = None
    scene.params[4].param.grad = None
    assert list(scene.view.begin_backward()) == [1, 4]
    assert scene.view.take().tolist() == [int(i not in (1, 4)) for i in range(len(scene.params))]
    assert [scene.view.has_local(managed) for managed in scene.params[:2]] == [True, False]
    assert scene.view.take_local(scene.params[1]) is None and scene.view.whole(scene.params[1]) is None


def test_a_replaced_gradient_is_copied_into_its_place() -> None:
    scene = Scene()
    weight = scene.params[0]
    replaced = torch.randn(weight.shape)
    weight.param.grad = replaced
    assert scene.view.take()[0] == 1
    assert scene.shows(weight) and torch.equal(scene.own(weight), replaced)
    assert weight.param.grad is not replaced


def test_an_edit_in_place_is_there_already() -> None:
    scene = Scene()
    grad = scene.params[0].param.grad
    assert grad is not None
    grad.fill_(3.0)
    scene.view.take()
    assert scene.params[0].param.grad is grad and bool((scene.own(scene.params[0]) == 3).all())


def test_a_store_has_a_sum_where_a_gradient_was_set_by_hand() -> None:
    scene = Scene(trained=False)
    scene.params[0].param.grad = torch.ones(scene.params[0].shape)
    scene.view.take()
    index = next(bucket.index for bucket in scene.replica.buckets if scene.params[0] in bucket.params)
    assert [store.holds_sum for store in scene.replica.reducer.stores] == [
        bucket.index == index for bucket in scene.replica.buckets
    ]


def test_what_was_edited_after_it_was_packed_is_named() -> None:
    scene = Scene()
    for managed in scene.params:
        scene.view.packed(managed)
    packed = bytearray([1] * len(scene.params))
    assert scene.view.take_edited(packed) is None
    grad = scene.params[2].param.grad
    assert grad is not None
    grad.mul_(2)
    assert scene.view.take_edited(packed) is scene.params[2]
    packed[2] = 0
    assert scene.view.take_edited(packed) is None, "its hook may do so"


def test_gradients_that_others_have_are_shown() -> None:
    scene = Scene()
    for managed in scene.params[:3]:
        managed.param.grad = None
    kept = scene.params[3].param.grad
    scene.view.show_used(torch.tensor([1, 0, 1, *[1] * (len(scene.params) - 3)], dtype=torch.uint8))
    assert [scene.shows(managed) for managed in scene.params[:3]] == [True, False, True]
    assert scene.params[1].param.grad is None and scene.params[3].param.grad is kept


@pytest.mark.parametrize("call", ["drop_local", "stop_contributing"])
def test_what_is_dropped_is_gone(call: str) -> None:
    scene = Scene()
    getattr(scene.view, call)()
    assert all(managed.param.grad is None for managed in scene.params)


def test_following_a_rank_shows_what_it_has() -> None:
    """Alone, that is this rank itself."""
    scene = Scene()
    scene.params[0].param.grad = None
    scene.params[1].param.grad = torch.full(scene.params[1].shape, 5.0)
    scene.view.follow(0)
    assert scene.params[0].param.grad is None
    assert all(map(scene.shows, scene.params[1:])) and bool((scene.own(scene.params[1]) == 5).all())


def test_moved_sums_are_shown_where_they_are() -> None:
    scene = Scene()
    outside = [torch.randn(managed.shape) for managed in scene.params[:2]]
    scene.params[0].param.grad, scene.params[1].param.grad = outside
    scene.params[2].param.grad = None
    scene.view.moved()
    assert all(map(scene.shows, [*scene.params[:2], *scene.params[3:]])) and scene.params[2].param.grad is None
    assert torch.equal(scene.own(scene.params[1]), outside[1])


def test_factors_are_settled_in_the_gradients() -> None:
    scene = Scene()
    before = [scene.own(managed).clone() for managed in scene.params]
    stores = scene.replica.reducer.stores
    scale_sums([stores[0]], torch.tensor(0.5))
    scene.view.settle(stores)
    first = scene.replica.buckets[0].params
    for managed, value in zip(scene.params, before, strict=True):
        assert torch.equal(scene.own(managed), value * (0.5 if managed in first else 1.0))


@pytest.mark.skipif(not hasattr(torch.nn.utils, "get_total_norm"), reason="torch 2.6 has it")
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_is_torchs_over_what_is_asked_for(norm_type: float) -> None:
    scene = Scene()
    stores, buckets = scene.replica.reducer.stores, scene.replica.buckets
    active = torch.ones(len(scene.params), dtype=torch.uint8)
    active[buckets[0].params[0].index] = 0
    for number in range(len(stores) + 1):
        chosen = [m for bucket in buckets[:number] for m in bucket.params if active[m.index]]
        expected = (
            torch.nn.utils.get_total_norm([scene.own(m) for m in chosen], norm_type) if chosen else torch.zeros(())
        )
        norm = scene.view.norm(stores[:number], active, NOWHERE, norm_type)
        assert norm.dtype is torch.float64 and norm.shape == ()
        torch.testing.assert_close(norm, expected.double(), rtol=1e-6, atol=0)


def test_copies_are_in_memory_of_their_own() -> None:
    scene = Scene()
    scene.params[1].param.grad = None
    copies = scene.view.as_under_torch(scene.params[:2])
    copied = copies[scene.params[0]]
    assert copied is not None and torch.equal(copied, scene.own(scene.params[0]))
    assert copied.data_ptr() != scene.own(scene.params[0]).data_ptr()
    assert copies[scene.params[1]] is None
