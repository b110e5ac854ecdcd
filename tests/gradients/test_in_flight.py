"""Buckets come back in the order in which they have started, and their buffers no sooner than all ranks have read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from zeroopt.collectives import PendingCollective
from zeroopt.feature import Feature, Features
from zeroopt.gradients.in_flight import InFlight
from zeroopt.storage.stripe import Stripe


class Log(Feature):
    """What has happened, in order. Hears of sums as features do."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def bucket_reduced(self, bucket: Any, store: Any) -> None:
        self.lines.append(f"heard {bucket} {store.label}")

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


class Gather(PendingCollective):
    def __init__(self, log: Log, label: str) -> None:
        self._log, self._label = log, label

    def finish(self) -> None:
        self._log.lines.append(f"gathered {self._label}")


class FakeTransport:
    is_queued = False

    def __init__(self, log: Log) -> None:
        self._log = log

    def start_all_gather(self, full: Tensor, *, label: str) -> PendingCollective:
        self._log.lines.append(f"gather {label}")
        return Gather(self._log, label)

    def flush(self) -> None:
        self._log.lines.append("flush")


class Pool:
    """So many buffers."""

    def __init__(self, count: int) -> None:
        self.idle = [torch.zeros(1) for _ in range(count)]


class Store:
    """The gradients of a bucket, which write down what becomes of them."""

    def __init__(self, label: str, log: Log, pool: Pool | None = None, *, spread: bool = False) -> None:
        self.label, self.sum_is_spread = label, spread
        self.full: Tensor | None = torch.zeros(1) if pool is None else None
        self._log, self._pool = log, pool
        self.fails = False
        self.holds_sum = True
        self.stripe = Stripe(0, 1, 1, 1)

    def open(self) -> Tensor:
        self._log.lines.append(f"open {self.label}")
        if self._pool is not None:
            if self.full is not None:
                self.reclaim_next()
            self.full = self._pool.idle.pop()
        assert self.full is not None
        return self.full

    def start_reduce(self, transport: object) -> None:
        self._log.lines.append(f"start {self.label}")

    def finish_next(self, *, wait: bool) -> None:
        if self.fails:
            raise RuntimeError(f"{self.label} is lost")
        self._log.lines.append(f"sum {self.label}" if wait else f"go on beside {self.label}")

    def reclaim_next(self) -> None:
        self._log.lines.append(f"reclaim {self.label}")
        if self._pool is not None:
            assert self.full is not None
            self._pool.idle.append(self.full)
            self.full = None


class Scene:
    """Three buckets, and what they travel by."""

    def __init__(
        self,
        buffers: int | None = None,
        *,
        most: int = 2,
        spread: bool = False,
        is_queued: bool = False,
        heard: bool = True,
    ) -> None:
        self.log = Log()
        features = Features()
        features.add(self.log, on=heard)
        self.pool = None if buffers is None else Pool(buffers)
        transport: Any = FakeTransport(self.log)
        transport.is_queued = is_queued
        pool: Any = self.pool
        self.flight = InFlight(transport, features, pool)
        self.flight.most = most
        self.stores: list[Any] = [Store(name, self.log, self.pool, spread=spread) for name in "abc"]

    def start(self, *numbers: int) -> None:
        for number in numbers:
            bucket: Any = number
            self.flight.start(bucket, self.stores[number])

    def fill_and_start(self, number: int) -> None:
        """As a backward does."""
        if self.pool is not None:
            self.flight.free_buffer()
        self.flight.open(self.stores[number])
        self.flight.make_way()
        self.start(number)


@pytest.fixture
def scene() -> Iterator[Scene]:
    yield Scene()


def test_sums_come_in_the_order_of_the_start_and_features_hear_of_each(scene: Scene) -> None:
    scene.start(2, 0, 1)
    assert len(scene.flight) == 3
    assert scene.log.take() == ["start c", "start a", "start b"]
    scene.flight.finish_oldest()
    assert scene.log.take() == ["sum c", "heard 2 c"] and len(scene.flight) == 2
    scene.flight.finish_sums()
    assert scene.log.take() == ["sum a", "heard 0 a", "sum b", "heard 1 b"] and len(scene.flight) == 0
    scene.flight.finish_sums()
    assert scene.log.take() == []


@pytest.mark.parametrize(("most", "left"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3)])
def test_one_more_makes_at_most_so_many(scene: Scene, most: int, left: int) -> None:
    scene.start(0, 1, 2)
    scene.flight.most = most
    scene.flight.make_way()
    assert len(scene.flight) == left


def test_what_has_failed_is_still_the_oldest(scene: Scene) -> None:
    scene.start(0, 1)
    scene.stores[0].fails = True
    scene.log.take()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a is lost"):
            scene.flight.finish()
    assert scene.log.take() == [] and len(scene.flight) == 2


def test_a_sum_for_all_ranks_is_gathered_as_soon_as_it_is_there() -> None:
    scene = Scene(spread=True)
    scene.start(0, 1)
    scene.log.take()
    scene.flight.finish_oldest()
    assert scene.log.take() == ["sum a", "heard 0 a", "gather a"]
    scene.flight.finish()
    assert scene.log.take() == ["sum b", "heard 1 b", "gather b", "flush", "gathered a", "gathered b"]
    scene.flight.finish()
    assert scene.log.take() == ["flush"], "they are waited for once"


def test_on_a_queue_the_gather_follows_its_sum_at_once_and_nobody_waits() -> None:
    scene = Scene(spread=True, is_queued=True, heard=False)
    scene.start(0, 1)
    assert scene.log.take() == [
        *("start a", "go on beside a", "gather a"),
        *("start b", "go on beside b", "gather b"),
    ]
    assert len(scene.flight) == 0 and not scene.flight.is_finished
    scene.flight.finish()
    assert scene.log.take() == ["flush", "gathered a", "gathered b"]
    assert scene.flight.is_finished


def test_unless_somebody_looks_at_the_sum() -> None:
    scene = Scene(spread=True, is_queued=True)
    scene.start(0)
    assert scene.log.take() == ["start a"]
    scene.flight.finish_oldest()
    assert scene.log.take() == ["sum a", "heard 0 a", "gather a"]


def test_without_a_pool_nothing_is_lent(scene: Scene) -> None:
    scene.start(0)
    scene.flight.finish()
    scene.log.take()
    assert scene.flight.open(scene.stores[0]) is scene.stores[0].full
    assert scene.log.take() == ["open a"]


def test_with_few_buffers_the_oldest_comes_back_first() -> None:
    scene = Scene(buffers=2)
    scene.fill_and_start(0)
    scene.fill_and_start(1)
    assert scene.log.take() == ["open a", "start a", "open b", "start b"]
    scene.fill_and_start(2)
    assert scene.log.take() == ["sum a", "heard 0 a", "reclaim a", "open c", "start c"]
    scene.flight.finish()
    scene.log.take()
    scene.fill_and_start(0)
    assert scene.log.take() == ["reclaim b", "open a", "start a"], (
        "whose sum is there, so that only readers are waited for"
    )


def test_an_idle_buffer_is_not_waited_for() -> None:
    scene = Scene(buffers=1)
    scene.flight.free_buffer()
    assert scene.log.take() == []


def test_a_bucket_that_is_opened_again_is_lent_no_longer() -> None:
    scene = Scene(buffers=2)
    scene.fill_and_start(0)
    scene.fill_and_start(1)
    scene.flight.finish()
    scene.log.take()
    scene.flight.open(scene.stores[0])
    assert scene.log.take() == ["open a", "reclaim a"]
    scene.flight.free_buffer()
    assert scene.log.take() == ["reclaim b"], "and not a, which is being filled"


def test_what_has_been_reclaimed_is_forgotten() -> None:
    scene = Scene(buffers=1)
    scene.fill_and_start(0)
    scene.flight.finish()
    scene.stores[0].reclaim_next()
    scene.flight.forget_lent()
    scene.fill_and_start(1)
    scene.log.take()
    scene.flight.free_buffer()
    assert scene.log.take() == ["sum b", "heard 1 b", "reclaim b"]
