"""A model has the features that its options ask for, in the order in which they have to be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone import Lone
from torch import Tensor

from zeroopt.collectives.lone import lone_group
from zeroopt.collectives.single import SingleTransport
from zeroopt.feature import Feature
from zeroopt.features.audit import Audit
from zeroopt.features.clipping import BucketNorms
from zeroopt.features.join import Joining
from zeroopt.features.of_model import ModelFeatures
from zeroopt.storage.bucket import Bucket
from zeroopt.storage.gradient_store import GradientStore
from zeroopt.storage.stripe import Stripe


class Own(Feature):
    """A user's."""

    def bucket_filled(self, bucket: Bucket, stripe: Stripe, full: Tensor) -> None:
        pass

    def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
        pass


def features_of(*further: Feature, **options: Any) -> ModelFeatures:
    """Those of a model that is wrapped with these options."""
    lone = Lone(stage=1, **options)
    found = ModelFeatures(lone.replica.transport)
    found.add_all(lone.replica, lone.replica.config, torch.device("cpu"), further)
    return found


def called(found: ModelFeatures, event: str) -> list[type]:
    """Whose methods are called then."""
    features = found.features.called(event)
    assert len(found.features.calls[event]) == len(features)
    return [type(each) for each in features]


def test_before_anything_is_added_all_ranks_train() -> None:
    found = ModelFeatures(SingleTransport(lone_group()))
    assert (found.turnout.divisor, found.turnout.source) == (1, 0)
    assert found.audit is None and not found.join.is_on
    assert not any(found.features.calls.values())


def test_without_options_nothing_is_called() -> None:
    found = features_of()
    assert found.audit is None and not any(found.features.calls.values())


def test_the_audit_is_there_where_it_is_asked_for() -> None:
    found = features_of(check_every=3)
    assert isinstance(found.audit, Audit) and called(found, "bucket_filled") == [Audit]


def test_norms_are_those_of_sums_as_others_have_left_them() -> None:
    own = Own()
    found = features_of(own, check_every=1, max_grad_norm=1.0)
    assert called(found, "bucket_filled") == [Audit, Own]
    assert called(found, "bucket_reduced") == [Own, BucketNorms]
    later = features_of(own)
    later.norms.prepare(2.0)
    assert called(later, "bucket_reduced") == [Own, BucketNorms], "also where they are asked for later"


@pytest.mark.parametrize("times", [1, 2])
def test_who_joins_is_called_while_join_is_open(times: int) -> None:
    found = features_of(Own(), check_every=1)
    assert Joining not in called(found, "backward_begins")
    for _ in range(times):
        found.join.is_on = True
        found.follow_join()
        assert called(found, "backward_begins")[0] is Joining
        found.join.is_on = False
        found.follow_join()
        assert Joining not in called(found, "backward_begins")
