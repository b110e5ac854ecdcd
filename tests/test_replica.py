"""The buckets of one model, on a rank alone: parameters come in, move to other buckets, and leave with their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lone_slice import config_with
from torch import Tensor, nn

from zeroopt import StateError
from zeroopt.collectives.lone import lone_group
from zeroopt.collectives.single import SingleTransport
from zeroopt.collectives.turnout import Turnout
from zeroopt.feature import Features
from zeroopt.options.precision import Precision
from zeroopt.plan.claims import claimed_params
from zeroopt.plan.params import ManagedParam
from zeroopt.replica import Replica, cast_frozen
from zeroopt.state.inner_state import InnerState
from zeroopt.storage.bucket import Bucket

BF16 = torch.bfloat16
STAGES = (0, 1, 2)


def build(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(count)))


def managed(net: nn.Module, first: int = 0) -> list[ManagedParam]:
    named = list(net.named_parameters())[first:]
    return [ManagedParam(name, param, i, 0, i) for i, (name, param) in enumerate(named, first)]


def replica_of(net: nn.Module, stage: int = 2, **options: Any) -> Replica:
    transport = SingleTransport(lone_group())
    config = config_with(stage=stage, bucket_mb=1e-4, **options)
    return Replica(net, config, transport, lone_group(), Features(), Turnout(1), lambda what: None)


def values(net: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def check_places(replica: Replica) -> None:
    """Every parameter lies in the one bucket that lists it, at its offset."""
    held = [m for bucket in replica.buckets for m in bucket.params]
    assert sorted(m.index for m in held) == list(range(len(replica.params)))
    assert [m.index for m in replica.params] == list(range(len(replica.params)))
    for number, bucket in enumerate(replica.buckets):
        assert bucket.index == number
        for m in bucket.params:
            assert m.param.data_ptr() == bucket.flat_param[m.offset :].data_ptr()


def backward(replica: Replica) -> list[Tensor]:
    """Sums of gradients, as the stores have them."""
    replica.module(torch.ones(2, 6)).square().sum().backward()
    replica.reducer.finish()
    return sums_of(replica)


def sums_of(replica: Replica) -> list[Tensor]:
    stores = zip(replica.reducer.buckets, replica.reducer.stores, strict=True)
    shown = {m: m.view_in(store.reduced).clone() for bucket, store in stores for m in bucket.params}
    return [shown[m] for m in replica.params]


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_taken_in_and_their_gradients_summed(stage: int) -> None:
    net, twin = build(), build()
    torch.manual_seed(1234)
    replica = replica_of(net, stage)
    assert replica.seed == 1234
    buckets = replica.take_in(managed(net), Precision())
    assert buckets == replica.buckets and len(buckets) > 1
    check_places(replica)
    assert all(map(torch.equal, values(net), values(twin)))
    twin(torch.ones(2, 6)).square().sum().backward()
    for got, param in zip(backward(replica), twin.parameters(), strict=True):
        torch.testing.assert_close(got, param.grad)


@pytest.mark.parametrize("stage", STAGES)
def test_further_ones_get_buckets_of_their_own(stage: int) -> None:
    net, twin = build(), build()
    replica = replica_of(net, stage)
    every = managed(net)
    first = replica.take_in(every[:3], Precision())
    second = replica.take_in(every[3:], Precision(BF16))
    assert replica.buckets == [*first, *second]
    check_places(replica)
    assert {bucket.dtype for bucket in first} == {torch.float32} and {bucket.dtype for bucket in second} == {BF16}
    torch.testing.assert_close(values(net)[:3], values(twin)[:3], rtol=0, atol=0)
    assert set(claimed_params()) >= set(every)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_and_sums_move_to_the_buckets_of_another_plan(stage: int) -> None:
    net = build()
    replica = replica_of(net, stage)
    replica.take_in(managed(net), Precision())
    sums, before = backward(replica), values(net)
    old = [bucket.flat_param for bucket in replica.buckets]  # kept, so that nothing new can lie there
    ordered = [replica.params[i] for i in (3, 0, 7, 5, 1, 2, 6, 4)]
    state: dict[Tensor, dict[str, Any]] = {
        segment.shard: {"step": torch.tensor(1.0), "exp_avg": segment.shard.detach().clone()}
        for bucket in replica.buckets
        for segment in bucket.segments
    }
    buckets = replica.lay_out(replica.make_plan(ordered, Precision()), ordered, Precision())
    replica.rebuild(buckets, InnerState(state))
    check_places(replica)
    held = [m.index for bucket in replica.buckets for m in bucket.params]
    assert held == [4, 6, 2, 1, 5, 7, 0, 3], "in the order of the plan, from the last one on"
    assert {flat.data_ptr() for flat in old}.isdisjoint(bucket.flat_param.data_ptr() for bucket in replica.buckets)
    assert all(map(torch.equal, values(net), before))
    segments = [segment for bucket in replica.buckets for segment in bucket.segments]
    assert set(state) == {segment.shard for segment in segments}
    for segment in segments:
        assert torch.equal(state[segment.shard]["exp_avg"], segment.shard)
    for bucket, store in zip(replica.buckets, replica.reducer.stores, strict=True):
        assert store.holds_sum
        for m in bucket.params:
            assert torch.equal(m.view_in(store.reduced), sums[m.index])


def go_ahead(replica: Replica, order: Sequence[int] = (3, 0, 7, 5, 1, 2, 6, 4)) -> list[Bucket]:
    """Gradients are to be put together in buckets to which the parameters have yet to move."""
    ordered = [replica.params[i] for i in order]
    ahead = replica.lay_out(replica.make_plan(ordered, Precision()), ordered, Precision())
    replica.lead_gradients(ahead)
    assert replica.reducer.is_ahead and list(replica.reducer.buckets) == ahead
    return ahead


def test_gradients_go_ahead_and_parameters_follow() -> None:
    net, twin = build(), build()
    replica, usual = replica_of(net), replica_of(twin)
    replica.take_in(managed(net), Precision())
    usual.take_in(managed(twin), Precision())
    before, places = values(net), [m.param.data_ptr() for m in replica.params]
    ahead = go_ahead(replica)
    sums = backward(replica)
    assert all(map(torch.equal, sums, backward(usual)))
    assert [m.param.data_ptr() for m in replica.params] == places, "parameters stay"
    assert all(bucket.flat_param.is_meta for bucket in ahead)
    stores = list(replica.reducer.stores)
    replica.rebuild(replica.reducer.buckets, InnerState({}))
    check_places(replica)
    assert replica.buckets == ahead and not replica.reducer.is_ahead
    assert replica.reducer.stores == stores == replica.reducer.stores_of_params, "sums stay"
    assert all(map(torch.equal, sums_of(replica), sums)) and all(map(torch.equal, values(net), before))
    assert all(map(torch.equal, backward(replica), backward(usual))), "which is added"


@pytest.mark.parametrize("first", [True, False])
def test_gradients_go_ahead_and_come_back(first: bool) -> None:
    """With sums that there are already, and with those of a backward that has gone by the other buckets."""
    net, twin = build(), build()
    replica, usual = replica_of(net), replica_of(twin)
    replica.take_in(managed(net), Precision())
    usual.take_in(managed(twin), Precision())
    places, stores = [m.param.data_ptr() for m in replica.params], list(replica.reducer.stores)
    expected = backward(usual)
    if first:
        backward(replica)
    go_ahead(replica)
    assert not any(store.holds_sum for store in stores) and replica.reducer.stores_of_params == stores
    if not first:
        backward(replica)
    assert all(map(torch.equal, sums_of(replica), expected))
    replica.rejoin_gradients()
    replica.rejoin_gradients()
    assert not replica.reducer.is_ahead and replica.reducer.stores == stores
    check_places(replica)
    assert all(map(torch.equal, sums_of(replica), expected))
    assert [m.param.data_ptr() for m in replica.params] == places
    assert all(map(torch.equal, backward(replica), backward(usual)))


def test_parameters_and_gradients_move_to_buckets_that_were_not_foreseen() -> None:
    net, twin = build(), build()
    replica, usual = replica_of(net), replica_of(twin)
    replica.take_in(managed(net), Precision())
    usual.take_in(managed(twin), Precision())
    before = values(net)
    go_ahead(replica)
    sums = backward(replica)
    backward(usual)
    ordered = list(reversed(replica.params))
    replica.rebuild(replica.lay_out(replica.make_plan(ordered, Precision()), ordered, Precision()), InnerState({}))
    check_places(replica)
    assert not replica.reducer.is_ahead
    assert all(map(torch.equal, sums_of(replica), sums)) and all(map(torch.equal, values(net), before))
    assert all(map(torch.equal, backward(replica), backward(usual)))


@pytest.mark.parametrize("how", ["take in", "take out"])
def test_gradients_come_back_before_parameters_come_or_go(how: str) -> None:
    net = build()
    replica = replica_of(net)
    every = managed(net)
    replica.take_in(every[:6], Precision())
    go_ahead(replica, [3, 0, 5, 1, 2, 4])
    sums = backward(replica)
    for m in every[6:]:
        m.param.grad = None
    if how == "take in":
        replica.take_in(every[6:], Precision())
    else:
        replica.take_out({replica.params[2]})
        del sums[2]
    check_places(replica)
    assert not replica.reducer.is_ahead
    assert all(map(torch.equal, sums_of(replica)[: len(sums)], sums))


def test_gradients_are_cleared_wherever_they_are() -> None:
    net = build()
    replica = replica_of(net)
    replica.take_in(managed(net), Precision())
    go_ahead(replica)
    backward(replica)
    replica.reducer.zero(replica.buckets)
    assert replica.reducer.is_zeroed and not any(store.reduced.any() for store in replica.reducer.stores)
    assert all(store.holds_sum for store in replica.reducer.stores)
    replica.reducer.discard(replica.buckets)
    assert not any(store.holds_sum for store in replica.reducer.stores)
    assert replica.reducer.is_ahead


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_that_leave_have_memory_of_their_own(stage: int) -> None:
    net = build()
    replica = replica_of(net, stage)
    replica.take_in(managed(net), Precision())
    before = values(net)
    gone, left = {replica.params[2], replica.params[5]}, [m for m in replica.params if m.index not in (2, 5)]
    replica.take_out(gone)
    assert replica.params == left
    check_places(replica)
    assert all(map(torch.equal, values(net), before))
    flats = [bucket.flat_param for bucket in replica.buckets]
    for m in gone:
        assert not any(flat.data_ptr() <= m.param.data_ptr() < flat.data_ptr() + flat.nbytes for flat in flats)


def test_gradients_from_before_stay_where_a_rank_is_alone() -> None:
    net = build(1)
    net[0].weight.grad = torch.full((6, 6), 2.0)
    replica = replica_of(net)
    replica.take_in(managed(net), Precision())
    assert torch.equal(net[0].weight.grad, torch.full((6, 6), 2.0))


def test_parameters_that_were_replaced_are_named() -> None:
    net = build()
    replica = replica_of(net)
    replica.take_in(managed(net), Precision())
    replica.check_replaced(replica.params)
    net[1] = nn.Linear(6, 6)
    replica.check_replaced(replica.params[:2])
    with pytest.raises(StateError, match=r"parameter '1.weight' is no longer part of the model"):
        replica.check_replaced(replica.params)


def test_buckets_of_later_parameters_start_in_the_reverse_order_of_the_model() -> None:
    net = build()
    replica = replica_of(net)
    every = managed(net)
    later_first = [*every[4:], *every[:4]]
    for index, m in enumerate(later_first):
        m.index = index
    replica.take_in(later_first[:4], Precision())
    replica.take_in(later_first[4:], Precision())
    assert replica._reverse_order() == [3, 2, 1, 0, 7, 6, 5, 4]
    net[0] = nn.Linear(6, 6)
    assert replica._reverse_order() == [3, 2, 1, 0, 7, 6, 4, 5], "what the model no longer has comes last"


def test_without_a_mesh_every_parameter_is_there_once() -> None:
    net = build(1)
    replica = replica_of(net)
    params = managed(net)
    replica.count_copies(params)
    assert [m.copies for m in params] == [1, 1] and replica.mesh is None and replica.mesh_groups == []
    assert replica.dtypes == {param: torch.float32 for param in net.parameters()}


def test_frozen_parameters_are_cast_with_the_rest() -> None:
    net = build(1)
    replica = replica_of(net)
    replica.take_in(managed(net), Precision())
    net[0].bias.requires_grad_(False)  # trained, though frozen for now
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    trainable, wide = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).double(), requires_grad=False)
    everything = [*net.parameters(), frozen, trainable, wide]
    cast_frozen(everything, None)
    assert all(param.dtype is not BF16 for param in everything)
    cast_frozen(everything, BF16)
    assert [param.dtype is BF16 for param in everything] == [False, False, True, False, False]
    assert replica.params, "which claims them as long as it lives"
