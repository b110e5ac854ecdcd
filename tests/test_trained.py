"""What one optimizer trains: which parameters it knows, what it does when they are written or leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeroopt
from zeroopt import ConfigError
from zeroopt.trained import Trained

BF16 = torch.bfloat16


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))


def wrapped(**options: Any) -> tuple[nn.Sequential, nn.Module, Trained]:
    """A model in several buckets, in a process alone."""
    net = build()
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.1), bucket_mb=1e-4, **options)
    return net, model, optimizer._trained


def test_parameters_in_their_order_and_buckets_with_their_sums() -> None:
    net, _, trained = wrapped()
    assert trained.number == 0
    assert [managed.param for managed in trained.params] == list(net.parameters())
    assert trained.generations == [[5, 4, 3, 2, 1, 0]]
    assert len(trained.buckets) > 1 and trained.buckets == trained.replica.buckets
    assert [store.label for store in trained.stores] == [bucket.name for bucket in trained.buckets]
    owners = {segment.owner for segment in trained.segments()}
    assert owners == set(trained.params)


def test_stores_are_those_of_its_own_buckets() -> None:
    net = build()
    first, rest = list(net.parameters())[:2], list(net.parameters())[2:]
    model, _ = zeroopt.wrap(net, torch.optim.AdamW(first), bucket_mb=1e-4)
    _, optimizer = zeroopt.wrap(model, torch.optim.SGD(rest, lr=0.1), bucket_mb=1e-4)
    trained = optimizer._trained
    assert trained.number == 1
    assert [managed.param for managed in trained.params] == rest
    assert [store.label for store in trained.stores] == [bucket.name for bucket in trained.buckets]
    assert trained.buckets[0].index > 0


def test_what_is_known_of_a_parameter() -> None:
    net, _, trained = wrapped()
    weight = net[1].weight
    assert trained.managed(weight).param is weight
    with pytest.raises(
        ConfigError, match=r"expected a parameter that this optimizer trains, got another tensor of shape"
    ):
        trained.managed(weight.detach())


def test_masters_follow_what_is_written_and_only_then() -> None:
    net, _, trained = wrapped(param_dtype=BF16)
    bucket = next(bucket for bucket in trained.buckets if trained.managed(net[0].bias) in bucket.params)
    offset = trained.managed(net[0].bias).offset
    before = bucket.master.exact().clone()
    net[0].bias.data.fill_(3)  # behind autograd's back
    trained.follow_writes()
    assert torch.equal(bucket.master.exact(), before)
    with torch.no_grad():
        net[0].bias.fill_(3)
    trained.follow_writes()
    assert bucket.master.exact(offset, offset + 6).tolist() == [3.0] * 6


def test_steps_are_no_writes() -> None:
    net, _, trained = wrapped(param_dtype=BF16)
    calls: list[int] = []
    trained.take_up_writes = lambda *_: calls.append(1)  # type: ignore[method-assign]
    active = torch.tensor([1, 0, 0, 0, 0, 1], dtype=torch.uint8)
    versions = [param._version for param in net.parameters()]
    trained.note_changes(active)
    assert [param._version - old for param, old in zip(net.parameters(), versions, strict=True)] == active.tolist()
    trained.follow_writes()
    assert not calls
    with torch.no_grad():
        net[2].bias.add_(1)
    trained.follow_writes()
    assert calls == [1]


def test_those_that_are_kept_have_new_places_in_what_was_planned() -> None:
    _, _, trained = wrapped()
    trained.generations = [[2, 1, 0], [5, 4, 3]]
    params = trained.params
    kept = [params[3], params[0], params[5]]
    versions = {managed: number for number, managed in enumerate(params)}
    trained._versions = list(versions.values())
    trained.keep([m for m in params if m in kept])
    assert trained.params is params and [m.index for m in params] == [0, 3, 5]
    assert trained.generations == [[0], [2, 1]]
    assert trained._versions == [versions[m] for m in params]
    trained.keep(params[:1])
    assert trained.generations == [[0]], "without those that have nothing left"


def test_numbers_of_a_rank_alone() -> None:
    _, _, trained = wrapped()
    gathered = trained.gather_number(2.5, "testing")
    assert gathered.tolist() == [2.5] and gathered.dtype is torch.float64


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_are_summed_when_they_are_finished(stage: int) -> None:
    net, _, trained = wrapped(stage=stage)
    net[0](torch.ones(2, 6)).sum().backward()
    active: Tensor = trained.finish_reduces()
    assert active.tolist() == [1, 1, 0, 0, 0, 0]


def test_a_module_that_was_replaced_is_noticed() -> None:
    net, _, trained = wrapped()
    net[2] = nn.Linear(6, 6)
    net[0](torch.ones(2, 6)).sum().backward()
    with pytest.raises(zeroopt.StateError, match="parameter '2.weight' is no longer part of the model"):
        trained.finish_reduces()


def test_rewriting_parameters_is_a_change_of_all() -> None:
    net, _, trained = wrapped()
    versions = [param._version for param in net.parameters()]
    with trained.rewriting_parameters():
        for bucket in trained.buckets:
            bucket.own_param.fill_(2)
    assert all((param == 2).all() for param in net.parameters())
    assert all(param._version > old for param, old in zip(net.parameters(), versions, strict=True))
    trained.take_up_writes = lambda *_: pytest.fail("these are no writes of others")  # type: ignore[method-assign]
    trained.follow_writes()
