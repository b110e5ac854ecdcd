"""A norm is known for as long as the gradients are those that were clipped by it, and is taken over the whole model once."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lone import Lone
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from zeroopt.feature import Features
from zeroopt.features import clipping
from zeroopt.features.clipping import BucketNorms, Clipping

STAGES = (0, 1, 2)
MAX_NORM = 0.01


def clipping_of(lone: Lone) -> Clipping:
    return lone.optimizer._clipping


def clipped_by_torch(max_norm: float, norm_type: float = 2.0, number: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The norm, and the gradients then, of the same backward on the plain model."""
    net = Lone().net
    plain = torch.nn.Sequential(*(torch.nn.Linear(layer.in_features, layer.out_features) for layer in net))
    plain.load_state_dict(net.state_dict())
    x = torch.randn(3, net[0].in_features, generator=torch.Generator().manual_seed(number))
    plain(x).square().mean().backward()
    norm = clip_grad_norm_(plain.parameters(), max_norm, norm_type)
    return norm, [param.grad for param in plain.parameters() if param.grad is not None]


def test_shares_of_a_norm_are_ready_only_when_somebody_clips() -> None:
    features = Features()
    norms = BucketNorms(features)
    features.add(norms, on=False)
    assert features.calls["bucket_reduced"] == []
    norms.prepare(3.0)
    norms.prepare(1.0)
    assert len(features.calls["bucket_reduced"]) == 1 and norms.norm_type == 1.0


@pytest.mark.parametrize(("spread", "noted"), [(False, [2.0]), (True, [])])
def test_a_sum_that_every_rank_has_whole_is_left_for_later(spread: bool, noted: list[float]) -> None:
    class Store:
        sum_is_spread = spread
        reduced = torch.zeros(1)

    seen: list[float] = []
    store: Any = Store()
    with patch.object(clipping, "note_norms", lambda _, norm_type: seen.append(norm_type)):
        BucketNorms(Features()).bucket_reduced(store, store)
    assert seen == noted


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [MAX_NORM, 1e6])
def test_clipping_is_torchs(stage: int, norm_type: float, max_norm: float) -> None:
    lone = Lone(stage)
    lone.backward()
    active = lone.optimizer._trained.finish_reduces()
    norm = clipping_of(lone).clip(active, max_norm, norm_type)
    expected, grads = clipped_by_torch(max_norm, norm_type)
    assert norm.dtype is torch.float64 and norm.shape == ()
    torch.testing.assert_close(norm.float(), expected)
    lone.replica.reducer.view.settle(lone.replica.reducer.stores)
    found = [lone.optimizer.full_grad(param) for param in lone.net.parameters()]
    torch.testing.assert_close(found, grads)


@pytest.mark.parametrize("stage", STAGES)
def test_only_a_2_norm_of_these_gradients_is_known(stage: int) -> None:
    lone = Lone(stage)
    feature = clipping_of(lone)
    lone.backward()
    active = lone.optimizer._trained.finish_reduces()
    assert feature.known_norm is None
    norm = feature.clip(active, MAX_NORM, 2.0)
    known = feature.known_norm
    assert known is not None and known.dtype is torch.float32 and torch.equal(known, norm.float())
    feature.clip(active, 1e6, 1.0)
    assert feature.known_norm is None
    feature.clip(active, 1e6, 2.0)
    assert feature.known_norm == pytest.approx(MAX_NORM, rel=1e-2), "of what has been clipped before"
    lone.backward(1)
    assert feature.known_norm is None, "gradients are others"


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_clips_by_the_norm_of_the_model(stage: int) -> None:
    lone = Lone(stage, max_grad_norm=MAX_NORM)
    before = [param.detach().clone() for param in lone.net.parameters()]
    lone.backward()
    lone.optimizer.step()
    expected, grads = clipped_by_torch(MAX_NORM)
    torch.testing.assert_close(clipping_of(lone).known_norm, expected)
    changes = [param.detach() - value for param, value in zip(lone.net.parameters(), before, strict=True)]
    torch.testing.assert_close(changes, [-0.5 * grad for grad in grads], rtol=1e-4, atol=1e-6)


def test_steps_of_several_optimizers_share_one_norm() -> None:
    lone = Lone(2, max_grad_norm=MAX_NORM)
    with patch.object(Clipping, "compute_norm", autospec=True, side_effect=Clipping.compute_norm) as computed:
        lone.backward()
        lone.optimizer.step()
        assert computed.call_count == 1
        norms = clipping_of(lone)._norms
        assert norms.of_model is not None and norms.of_model[0] == lone.replica.reducer.num_backwards
        peer = Clipping(lone.optimizer._trained, norms)
        active = torch.ones(len(lone.replica.params), dtype=torch.uint8)
        step: Any = type("Step", (), {"is_skipped": False, "active": active})()
        peer.on_gradients(step)
        assert computed.call_count == 1, "as the first one has found it"
        peer.on_gradients(step)
        assert computed.call_count == 2, "a second step with the same gradients, which are clipped by now"
        peer.forget_model()
        assert norms.of_model is None
        peer.on_gradients(step)
        assert computed.call_count == 3


def test_a_skipped_step_clips_nothing() -> None:
    lone = Lone(1, max_grad_norm=MAX_NORM)
    lone.backward()
    step: Any = type("Step", (), {"is_skipped": True})()
    clipping_of(lone).on_gradients(step)
    assert clipping_of(lone).known_norm is None and lone.replica.reducer.stores[0].factor is None


@pytest.mark.parametrize(("options", "expected"), [({"max_grad_norm": 1.0}, math.inf), ({}, None)], ids=str)
def test_a_step_that_overflowed_has_an_infinite_norm_where_it_was_to_clip(
    options: dict[str, Any], expected: float | None
) -> None:
    lone = Lone(1, **options)
    lone.backward()
    feature = clipping_of(lone)
    feature.note_overflow()
    assert feature.known_norm == expected
