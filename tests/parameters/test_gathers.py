"""One all-gather a bucket: what is pending, who is waited for, and in which order, in one process."""

from __future__ import annotations

import gc
from threading import Event, Thread
from unittest.mock import patch

import pytest
import torch
from lone_slice import LoneSlice, buckets_of, params_of, values
from torch import Tensor, nn

from zeroopt.collectives import PendingCollective
from zeroopt.collectives.pending import Done
from zeroopt.parameters.arriving import ArrivingParameter
from zeroopt.parameters.gathers import NoGathers, ParamGathers


class Gather(PendingCollective):
    """Writes what other ranks send when it is finished."""

    def __init__(self, transport: Slow, full: Tensor, label: str) -> None:
        self._transport, self._full, self._label = transport, full, label

    def finish(self) -> None:
        self._transport.events.append(f"finish {self._label}")
        self._full.fill_(7.0)


class Slow(LoneSlice):
    """Gathers come when they are waited for.

    Attributes:
        events: what was asked of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        self.events.append(f"start {label}")
        return Gather(self, full, label)

    def flush(self) -> None:
        self.events.append("flush")


class Model(nn.Module):
    """Two matrices in a bucket each."""

    def __init__(self) -> None:
        super().__init__()
        self.params = params_of(values((4, 4), 0), values((4, 4), 1))
        self.first, self.second = (managed.param for managed in self.params)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first @ self.second


class Layers(nn.Module):
    """Likewise, of a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.params = params_of(values((4, 4), 0), values((4, 4), 1))
        self.layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        for layer, managed in zip(self.layers, self.params, strict=True):
            layer.weight = managed.param

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def gathers_of(model: Model | Layers, transport: Slow, *, lazy: bool = True) -> ParamGathers:
    gathers = ParamGathers(model, transport, lazy=lazy)
    gathers.extend(buckets_of(model.params, transport, bucket_bytes=64))
    return gathers


def start_all(gathers: ParamGathers) -> None:
    for bucket in gathers._buckets:
        gathers.start(bucket, Done())


def classes(model: Model) -> set[str]:
    return {type(param).__name__ for param in (model.first, model.second)}


def test_parameters_are_marked_once_all_gathers_have_started() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    start_all(gathers)
    assert sorted(gathers.pending) == [0, 1]
    assert classes(model) == {"Parameter"}
    gathers.leave_to_readers()
    assert transport.events[-1] == "flush"
    assert classes(model) == {"ArrivingParameter"}
    assert isinstance(model.first, ArrivingParameter)


def test_a_reader_waits_for_its_bucket_alone() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    start_all(gathers)
    gathers.leave_to_readers()
    assert torch.equal(model.second + 0, torch.full((4, 4), 7.0))
    assert type(model.second) is nn.Parameter
    assert type(model.first) is not nn.Parameter
    assert len(gathers.pending) == 1
    assert [event for event in transport.events if event.startswith("finish")] == [
        f"finish {bucket.name}" for bucket in gathers._buckets if bucket.params[0].param is model.second
    ]


def test_a_forward_waits_for_what_it_owns() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    start_all(gathers)
    gathers.leave_to_readers()
    assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 4), 4 * 7.0 * 4 * 7.0))
    assert not gathers.pending


def test_where_gathers_are_not_lazy_the_step_waits_in_the_order_of_their_start() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport, lazy=False)
    start_all(gathers)
    gathers.leave_to_readers()
    names = [bucket.name for bucket in gathers._buckets]
    assert transport.events == [*(f"start {n}" for n in names), "flush", *(f"finish {n}" for n in names)]
    assert classes(model) == {"Parameter"}
    assert not model._forward_pre_hooks


def test_on_a_device_each_forward_and_reader_of_all_waits_on_its_own_stream() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    gathers._device = torch.device("cuda")
    start_all(gathers)
    with patch("zeroopt.parameters.gathers.is_capturing", lambda _: False):
        gathers.leave_to_readers()
    model(torch.ones(1, 4))
    first = transport.events.count("finish " + gathers._buckets[0].name)
    model(torch.ones(1, 4))  # may run on another stream
    gathers.finish_all()
    assert transport.events.count("finish " + gathers._buckets[0].name) == first + 2
    start_all(gathers)
    assert not gathers.arrived


def test_on_a_device_nobody_waits_any_more_when_it_is_through() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    gathers._device = torch.device("cuda")
    start_all(gathers)
    with patch("zeroopt.parameters.gathers.is_capturing", lambda _: False):
        gathers.leave_to_readers()
    model(torch.ones(1, 4))
    assert len(gathers.arrived) == 2
    waited = list(transport.events)
    with patch.object(Gather, "is_past", lambda _: True):
        model(torch.ones(1, 4))
    assert not gathers.arrived and transport.events == waited


def test_a_graph_ends_with_all_that_was_started_in_it() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    start_all(gathers)
    with patch("zeroopt.parameters.gathers.is_capturing", lambda _: True):
        gathers.leave_to_readers()
    assert not gathers.pending
    assert classes(model) == {"Parameter"}


def test_on_the_cpu_nobody_waits_again() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    start_all(gathers)
    gathers.leave_to_readers()
    model(torch.ones(1, 4))
    waited = len(transport.events)
    model(torch.ones(1, 4))
    gathers.finish_all()
    assert len(transport.events) == waited


def test_finishing_twice_waits_once() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    start_all(gathers)
    gathers.finish(0)
    gathers.finish(0)
    gathers.finish_all()
    assert len([event for event in transport.events if event.startswith("finish")]) == 2
    assert not gathers.pending


def test_readers_of_the_old_values_are_waited_for_first() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    bucket = gathers._buckets[0]
    gathers.start(bucket, Gather(transport, torch.zeros(1), "the others"))
    assert transport.events == ["finish the others", f"start {bucket.name}"]


def test_buckets_cannot_be_exchanged_while_one_is_on_its_way() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    start_all(gathers)
    with pytest.raises(AssertionError):
        gathers.attach(gathers._buckets)


def test_what_another_rank_writes_is_not_copied_into() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    before = model.first.detach().clone()
    with gathers.read_only(), torch.no_grad():
        model.first.copy_(torch.zeros(4, 4))
    assert torch.equal(model.first, before)
    assert classes(model) == {"Parameter"}
    with torch.no_grad():
        model.first.copy_(torch.zeros(4, 4))
    assert not model.first.any()


def test_parameters_that_are_on_their_way_keep_what_they_wait_for() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    start_all(gathers)
    gathers.leave_to_readers()
    del gathers
    gc.collect()
    assert torch.equal(model.first + 0, torch.full((4, 4), 7.0))


def test_without_ranks_that_step_other_slices_nothing_starts() -> None:
    model, transport = Model(), Slow()
    gathers = NoGathers(model, transport, lazy=True)
    gathers.extend(buckets_of(model.params, transport, bucket_bytes=64))
    start_all(gathers)
    gathers.leave_to_readers()
    assert transport.events == ["flush"]
    assert classes(model) == {"Parameter"}


def hooked(model: Layers) -> list[bool]:
    """Which layers have a hook of ours, or another one."""
    return [bool(layer._forward_pre_hooks) for layer in model.layers]


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests have compiled in this process."""
    monkeypatch.setattr("zeroopt.parameters.gathers.has_compiled", lambda: False)


@pytest.mark.usefixtures("nothing_compiled")
def test_layers_have_hooks_while_there_is_something_to_wait_for() -> None:
    model, transport = Layers(), Slow()
    gathers = gathers_of(model, transport)
    bucket_of = [next(b.index for b in gathers._buckets if m in b.params) for m in model.params]
    for _ in range(2):
        start_all(gathers)
        gathers.leave_to_readers()
        assert hooked(model) == [True, True]
        model.layers[0](torch.ones(1, 4))
        assert hooked(model) == [False, True]
        gathers.close(gathers._buckets[bucket_of[0]], Gather(transport, torch.zeros(1), "another"))
        assert hooked(model) == [True, True]
        assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 4), 4 * 7.0 * 4 * 7.0))
        assert hooked(model) == [False, False]
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach().clone()))
    start_all(gathers)
    assert next(iter(model.layers[0]._forward_pre_hooks.values())) is gathers._hooks[model.layers[0]]
    model(torch.ones(1, 4))
    assert len(seen) == 1 and hooked(model) == [True, False]
    gathers.remove_hooks()
    assert not model._forward_pre_hooks and not model.layers._forward_pre_hooks


@pytest.mark.usefixtures("nothing_compiled")
def test_on_a_device_hooks_stay_until_it_is_through() -> None:
    model, transport = Layers(), Slow()
    gathers = gathers_of(model, transport)
    gathers._device = torch.device("cuda")
    start_all(gathers)
    model(torch.ones(1, 4))
    assert hooked(model) == [True, True], "another stream may have to wait, too"
    with patch.object(Gather, "is_past", lambda _: True):
        model.layers[1](torch.ones(1, 4))
    assert hooked(model) == [True, False]


def test_hooks_stay_where_something_has_been_compiled() -> None:
    model, transport = Layers(), Slow()
    gathers = gathers_of(model, transport)
    with patch("zeroopt.parameters.gathers.has_compiled", lambda: True):
        start_all(gathers)
        model(torch.ones(1, 4))
        assert not gathers.pending and hooked(model) == [True, True]


def test_hooks_can_be_removed() -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport)
    assert len(model._forward_pre_hooks) == 1
    gathers.remove_hooks()
    assert not model._forward_pre_hooks


class Refusal(PendingCollective):
    """Parameters may not be used until something has happened."""

    is_over = False

    def finish(self) -> None:
        if not self.is_over:
            raise RuntimeError("too early")


@pytest.mark.parametrize("lazy", [True, False])
def test_a_closed_bucket_refuses_readers_until_it_is_open_again(lazy: bool) -> None:
    model, transport = Model(), Slow()
    gathers = gathers_of(model, transport, lazy=lazy)
    before, refusal = Refusal(), Refusal()
    before.is_over = True
    gathers.close(gathers._buckets[0], before)
    gathers.close(gathers._buckets[0], refusal)
    with pytest.raises(RuntimeError, match="too early"):
        model.second.sum()
    with pytest.raises(RuntimeError, match="too early"):
        gathers.finish(0)
    model.first.sum()
    refusal.is_over = True
    gathers.leave_to_readers()
    assert sorted(gathers.pending) == ([0] if lazy else [])
    model.second.sum()
    assert not gathers.pending and classes(model) == {"Parameter"}


class Reread(PendingCollective):
    """While somebody waits for it, another thread begins to read the same parameter."""

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.num_finished = 0
        self.seen: list[Tensor] = []
        self._reader, self._begins = Thread(target=self._read), Event()

    def finish(self) -> None:
        self.num_finished += 1
        if self.num_finished == 1:
            self._reader.start()
            self._begins.wait()

    def join(self) -> None:
        self._reader.join()

    def _read(self) -> None:
        self._begins.set()
        self.seen.append(self.param + 0)


@pytest.mark.parametrize("dropped", [False, True])
def test_threads_that_read_at_once_wait_once(dropped: bool) -> None:
    model = Model()
    gathers: ParamGathers | None = gathers_of(model, Slow())
    assert gathers is not None
    pending = Reread(model.first)
    bucket = next(bucket for bucket in gathers._buckets if bucket.params[0].param is model.first)
    gathers.close(bucket, pending)
    if dropped:
        gathers = None
    model.first + 0
    pending.join()
    assert pending.num_finished == 1 and len(pending.seen) == 1
    assert type(model.first) is nn.Parameter
