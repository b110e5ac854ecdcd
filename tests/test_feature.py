"""A `Feature` from outside of the package: what it is told, and when; and that one that is off costs nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from lone import Lone
from torch import Tensor
from training import batch, build, loss_of, optimizer_for, snapshot
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.feature import Feature, Features, Step
from zeroopt.storage.bucket import Bucket
from zeroopt.storage.gradient_store import GradientStore
from zeroopt.storage.stripe import Stripe


class Witness(zeroopt.Feature):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def backward_begins(self) -> None:
        self.heard.append("begin")

    def bucket_filled(self, bucket: Bucket, stripe: Stripe, full: Tensor) -> None:
        if stripe.is_first:
            self.heard.append(f"filled {bucket.index}")

    def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
        self.heard.append(f"reduced {bucket.index}")

    def gradients_cleared(self, buckets: Sequence[Bucket] | None) -> None:
        assert buckets is None, "of all, where there is one optimizer"
        self.heard.append("cleared")

    def before_step(self, step: Step) -> None:
        self.heard.append(f"before {step.number}")

    def on_gradients(self, step: Step) -> None:
        self.heard.append(f"gradients {int(step.active.sum())}")

    def stepped(self, step: Step, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        for bucket in buckets:
            self.heard.append(f"stepped {bucket.index}")
            yield bucket

    def after_step(self, step: Step) -> None:
        self.heard.append("after")


def listen(stage: int) -> tuple[list[str], int, list[Tensor]]:
    net, witness = build("mlp"), Witness()
    model, optimizer = zeroopt.wrap(
        net, optimizer_for("adamw", net), stage=stage, bucket_mb=0.01, overlap=False, features=[witness]
    )
    loss_of(model(batch("mlp", 0))).backward()
    optimizer.step()
    optimizer.zero_grad()
    return witness.heard, len(model.replica.buckets), snapshot(net)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_a_feature_is_told(run_on_ranks: RunOnRanks, stage: int) -> None:
    (heard, num_buckets, trained), (other, _, _) = run_on_ranks(2, listen, stage)
    assert heard == other
    assert num_buckets > 1
    buckets = range(num_buckets)
    travelling = [f"{what} {index}" for index in buckets for what in ("filled", "reduced")]
    stepped = [f"stepped {index}" for index in reversed(buckets)]
    num_params = len(list(build("mlp").parameters()))
    assert heard == ["begin", *travelling, "before 1", f"gradients {num_params}", *stepped, "after", "cleared"]
    assert len(trained) == num_params


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_that_somebody_else_clears_are_noticed_when_the_next_backward_begins(stage: int) -> None:
    witness = Witness()
    lone = Lone(stage, features=[witness])

    def hear() -> list[str]:
        heard = [event for event in witness.heard if event in ("begin", "cleared")]
        witness.heard.clear()
        return heard

    lone.backward()
    assert hear() == ["begin"]
    lone.backward()
    assert hear() == ["begin"], "what was summed before is there"
    for param in lone.net.parameters():
        param.grad = None
    lone.backward()
    assert hear() == ["cleared", "begin"]
    lone.optimizer.zero_grad()
    lone.backward()
    assert hear() == ["cleared", "begin"], "once"
    with lone.model.no_sync():
        lone.backward()
    lone.backward()
    assert hear() == ["begin"]


class Cleared(zeroopt.Feature):
    """Writes down whose gradients have been cleared, by the names of parameters; None: all."""

    def __init__(self) -> None:
        self.heard: list[list[str] | None] = []

    def gradients_cleared(self, buckets: Sequence[Bucket] | None) -> None:
        names = None if buckets is None else [managed.name for bucket in buckets for managed in bucket.params]
        self.heard.append(names)


def test_a_feature_is_told_whose_gradients_an_optimizer_clears() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    cleared = Cleared()
    model, first = zeroopt.wrap(net, torch.optim.SGD(net[0].parameters(), lr=0.1), features=[cleared])
    model, second = zeroopt.wrap(model, torch.optim.SGD(net[1].parameters(), lr=0.1))
    model(torch.ones(1, 2)).sum().backward()
    first.zero_grad()
    second.zero_grad(set_to_none=False)
    model.zero_grad()
    assert cleared.heard == [["0.weight"], ["1.weight"], None]


class Halving(zeroopt.Feature):
    """Halves every sum."""

    def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
        store.reduced.mul_(0.5)


def halved(options: dict[str, Any], feature: bool) -> list[Tensor]:
    net = build("mlp")
    features = [Halving()] if feature else []
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), bucket_mb=0.01, features=features, **options)
    for step in range(3):
        (loss_of(model(batch("mlp", step))) * (1.0 if feature else 0.5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


# Norms to clip by are those of the sums as they have become.
@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2}, {"stage": 2, "max_grad_norm": 1e-3}])
def test_a_feature_may_change_sums(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    with_feature, without = run_on_ranks(2, halved, options, True), run_on_ranks(2, halved, options, False)
    for one, other in zip(with_feature[0], without[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def refused(features: Any, second: bool) -> str:
    net = build("mlp")
    matrices = [param for param in net.parameters() if param.dim() == 2]
    rest = [param for param in net.parameters() if param.dim() != 2]
    model: Any = net
    try:
        if second:
            model, _ = zeroopt.wrap(net, torch.optim.SGD(matrices, lr=0.1))
            zeroopt.wrap(model, torch.optim.SGD(rest, lr=0.1), features=features)
        else:
            zeroopt.wrap(model, torch.optim.SGD(matrices, lr=0.1), features=features)
    except zeroopt.ConfigError as error:
        return str(error)
    return "accepted"


def test_what_is_no_feature_is_refused(run_on_ranks: RunOnRanks) -> None:
    for message in run_on_ranks(2, refused, [print], False):
        assert message == "expected features to be zeroopt.Feature objects, got builtin_function_or_method"
    for message in run_on_ranks(2, refused, [Halving()], True):
        assert message.startswith("features take part in the steps of all optimizers of a model")


class Named(Feature):
    """Tells its name."""

    def __init__(self, name: str, heard: list[str]) -> None:
        self._name, self._heard = name, heard

    def bucket_reduced(self, bucket: Any, store: Any) -> None:
        self._heard.append(self._name)


def test_only_those_that_are_on_and_override_a_call_are_called() -> None:
    heard: list[str] = []
    features, first, second = Features(), Named("first", heard), Named("second", heard)
    features.add(first, on=False)
    features.add(second)
    features.add(Feature())
    reduced = features.calls["bucket_reduced"]

    def who_hears() -> list[str]:
        heard.clear()
        for call in reduced:
            call(None, None)
        return heard

    assert who_hears() == ["second"]
    assert not features.calls["before_step"]
    features.switch(first, on=True)
    assert who_hears() == ["first", "second"]  # the same list, in the order of `add`
    features.switch(first, on=True)  # so it is already
    features.switch(second, on=False)
    assert who_hears() == ["first"]


def test_who_calls_keeps_no_feature_alive() -> None:
    features = Features()
    features.add(Named("one", []))
    calls, gone = features.calls, weakref.ref(features._known[0])
    del features
    assert gone() is None and len(calls["bucket_reduced"]) == 1
