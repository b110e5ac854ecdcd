"""Each gradient lies in its place of its bucket, scaled, and what has not come is zero."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from lone import Lone
from torch import Tensor

from zeroopt.errors import StateError
from zeroopt.gradients.filling import Filling
from zeroopt.plan.params import ManagedParam

STAGES = (0, 1, 2)


class Scene(Lone):
    """A filling beside that of the model's own backward passes."""

    def __init__(self, stage: int = 0) -> None:
        super().__init__(stage)
        self.filling = Filling(self.replica.reducer.view)
        self.filling.attach(self.replica.params, self.replica.buckets)
        self.fulls = [torch.full((bucket.padded_numel,), torch.nan) for bucket in self.replica.buckets]
        for bucket, full in zip(self.replica.buckets, self.fulls, strict=True):
            bucket.zero_gaps(full)

    def set_gradients(self, params: Sequence[ManagedParam]) -> dict[int, Tensor]:
        """As autograd leaves them; returns them by index."""
        grads = {managed.index: torch.randn(managed.shape) for managed in params}
        for managed in params:
            managed.param.grad = grads[managed.index].clone()
        return grads

    def lies(self, managed: ManagedParam) -> Tensor:
        """What is in a parameter's place."""
        return managed.view_in(self.fulls[self.filling.arrivals.bucket_of[managed.index]])


def test_it_knows_where_everything_belongs() -> None:
    scene = Scene()
    filling, buckets = scene.filling, scene.replica.buckets
    assert len(buckets) > 1
    assert filling.params == scene.replica.params
    assert filling.arrivals.bucket_of == [
        next(bucket.index for bucket in buckets if managed in bucket.params) for managed in scene.replica.params
    ]
    assert filling.arrivals.missing == [len(bucket.params) for bucket in buckets]


def test_gradients_that_have_stayed_are_not_forgotten_with_the_buckets() -> None:
    scene = Scene()
    scene.filling.streams.note_left()
    scene.filling.regroup(scene.replica.buckets)
    assert scene.filling.streams.are_left
    scene.filling.reset()
    assert not scene.filling.streams.are_left


def test_a_backward_begins_and_ends() -> None:
    scene = Scene()
    filling = scene.filling
    sizes = [len(bucket.params) for bucket in scene.replica.buckets]
    filling.arrivals.order.append(3)
    filling.begin(0.25)
    assert filling.scale == 0.25 and filling.arrivals.order == []
    count = len(filling.params)
    filling.arrivals.arrived[0] = filling.packed[0] = 1
    filling.arrivals.missing[0] -= 1
    filling.arrivals.order.append(0)
    filling.reset()
    assert (filling.arrivals.arrived, filling.packed) == (bytearray(count), bytearray(count))
    assert filling.arrivals.missing == sizes and filling.arrivals.order == [0], "which is asked for later"
    filling.arrivals.missing[0] -= 1
    filling.reset()
    assert filling.arrivals.missing == sizes
    filling.attach(scene.replica.params, scene.replica.buckets)
    assert filling.arrivals.order == []


def test_without_parameters_nothing_is_missing() -> None:
    filling = Filling(Scene().replica.reducer.view)
    assert (filling.arrivals.missing, filling.params, filling.arrivals.bucket_of) == ([], [], [])
    filling.check_storage()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_go_one_by_one_to_their_places(stage: int, scale: float) -> None:
    scene = Scene(stage)
    grads = scene.set_gradients(scene.replica.params)
    scene.filling.begin(scale)
    for managed in scene.replica.params:
        autograds = managed.param.grad
        assert scene.filling.pack(managed, scene.fulls[scene.filling.arrivals.bucket_of[managed.index]])
        assert managed.param.grad is not autograds, "which has been freed"
        assert torch.equal(scene.lies(managed), scale * grads[managed.index])
    assert all(scene.filling.packed) and not any(scene.filling.arrivals.arrived)
    assert not any(full.isnan().any() for full in scene.fulls)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_laid_out_otherwise_is_packed_too(stage: int) -> None:
    scene = Scene(stage)
    weight = scene.replica.params[0]
    values = torch.randn(weight.shape)
    for grad in (values.t().contiguous().t(), torch._neg_view(-values), values[:1].expand(weight.shape)):
        weight.param.grad = None
        weight.param.grad = grad
        assert scene.filling.pack(weight, scene.fulls[scene.filling.arrivals.bucket_of[0]])
        assert torch.equal(scene.lies(weight), grad)


@pytest.mark.parametrize("stage", STAGES)
def test_where_there_is_no_gradient_nothing_is_packed(stage: int) -> None:
    scene = Scene(stage)
    managed = scene.replica.params[0]
    full = scene.fulls[scene.filling.arrivals.bucket_of[0]]
    before = full.clone()
    assert not scene.filling.pack(managed, full)
    assert not any(scene.filling.packed) and torch.equal(full.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("waiting", [0, 1, 2])
def test_the_rest_is_packed_together_or_zero(stage: int, waiting: int) -> None:
    """One of the bucket has been packed, so many wait, and others have not come."""
    scene = Scene(stage)
    bucket = max(scene.replica.buckets, key=lambda bucket: len(bucket.params))
    full = scene.fulls[bucket.index]
    first, *others = bucket.params
    scene.filling.begin(0.5)
    early = scene.set_gradients([first])
    scene.filling.pack(first, full)
    late = scene.set_gradients(others[:waiting])
    scene.filling.pack_rest(bucket, full)
    expected = early | late
    for managed in bucket.params:
        grad = expected.get(managed.index, torch.zeros(managed.shape))
        assert torch.equal(scene.lies(managed), 0.5 * grad)
        assert scene.filling.packed[managed.index] == (managed.index in expected)
    packed = full.clone()
    scene.set_gradients([first])
    for managed in bucket.params:
        scene.filling.packed[managed.index] = 1
    scene.filling.pack_rest(bucket, full)
    assert torch.equal(full, packed), "nothing is packed twice"


def test_a_sparse_gradient_is_refused() -> None:
    scene = Scene(1)
    weight = scene.replica.params[0]
    weight.param.grad = torch.eye(6).to_sparse()
    with pytest.raises(StateError, match=r"'0\.weight' has a sparse gradient"):
        scene.filling.pack(weight, scene.fulls[scene.filling.arrivals.bucket_of[0]])


def test_a_parameter_that_lies_elsewhere_is_named() -> None:
    scene = Scene()
    scene.filling.check_storage()
    scene.net[2].bias.data = scene.net[2].bias.data.double()
    with pytest.raises(StateError, match=r"parameter '2\.bias' no longer lies .*\(it is now torch.float64 on cpu\)"):
        scene.filling.check_storage()
