"""Whoever packs a bucket comes behind all streams on which its gradients came, and whoever starts its reduce behind that."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from recorded_streams import RecordedStreams, recorded_streams

from zeroopt.gradients.packing_streams import PackingStreams


@pytest.fixture
def streams() -> Iterator[RecordedStreams]:
    with recorded_streams() as streams:
        yield streams


def packing(count: int = 1, device: str = "cuda") -> PackingStreams:
    """Of so many buckets."""
    return PackingStreams([SimpleNamespace(device=torch.device(device))] * count)  # type: ignore[list-item]


def test_one_stream_waits_for_nobody(streams: RecordedStreams) -> None:
    filling = packing()
    filling.note_waiting(0)
    filling.join(0)
    filling.note_opened(0)
    filling.join(0)
    assert streams.log == []


def test_the_reduce_comes_behind_who_has_packed(streams: RecordedStreams) -> None:
    filling = packing()
    with streams.stream("first"):
        filling.note_waiting(0)
    with streams.stream("second"):
        filling.note_opened(0)
        filling.join(0)
    assert streams.log == ["second waits for first"]
    streams.log.clear()
    with streams.stream("second"):
        filling.join(0)
    assert streams.log == []
    filling.join(0)
    assert streams.log == ["main waits for second"]


def test_gradients_that_wait_are_waited_for_by_who_packs_them(streams: RecordedStreams) -> None:
    filling = packing(2)
    for bucket in (0, 1, 1):
        with streams.stream(f"of bucket {bucket}"):
            filling.note_waiting(bucket)
    filling.join(1)
    assert streams.log == ["main waits for of bucket 1"]
    filling.join(1)  # of a later backward
    assert streams.log == ["main waits for of bucket 1"]


def test_a_later_backward_waits_for_no_stream_of_an_earlier_one(streams: RecordedStreams) -> None:
    """It may be captured into a CUDA graph, whose streams must not wait for any outside of it."""
    filling = packing()
    with streams.stream("warm-up"):
        filling.note_waiting(0)
        filling.note_opened(0)
    filling.forget()
    filling.join(0)
    assert streams.log == []


def test_their_memory_is_not_given_to_others_before(streams: RecordedStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeroopt.streams.has_streams", lambda device: True)  # also of the CPU, where these are
    grads = [torch.ones(2), torch.ones(3)]
    with streams.stream("late"):
        packing().note_read(grads)
    assert list(map(id, streams.used_on["late"])) == list(map(id, grads))


@pytest.mark.parametrize("came_on", [["main"], ["main", "other"], ["other"]], ids=str)
@pytest.mark.parametrize("are_left", [False, True])
def test_the_allocator_hears_of_gradients_that_came_on_other_streams(
    streams: RecordedStreams, monkeypatch: pytest.MonkeyPatch, came_on: list[str], are_left: bool
) -> None:
    monkeypatch.setattr("zeroopt.streams.has_streams", lambda device: True)
    filling, grads = packing(2), [torch.ones(2)]
    if are_left:
        filling.note_left()
    for name in came_on:
        with streams.stream(name):
            filling.note_waiting(0)
    filling.note_waiting(1)
    for bucket in (0, 1):
        filling.join(bucket)
    filling.note_all_read(0, grads)
    assert bool(streams.used_on) is (are_left or "other" in came_on)
    streams.used_on.clear()
    filling.note_all_read(1, grads)
    assert bool(streams.used_on) is are_left
    streams.used_on.clear()
    filling.forget()
    filling.note_all_read(0, grads)
    assert not streams.used_on


def test_it_is_known_on_which_stream_the_last_gradient_waits(streams: RecordedStreams) -> None:
    filling = packing(2)
    assert filling.last == [None, None]
    with streams.stream("first"):
        filling.note_waiting(1)
        assert filling.last[1] == filling.tell()
    with streams.stream("second"):
        filling.note_waiting(1)
        assert filling.last == [None, filling.tell()]
    filling.join(1)
    assert filling.last == [None, None]
    filling.note_waiting(0)
    filling.forget()
    assert filling.last == [None, None]
    on_cpu = packing(device="cpu")
    on_cpu.note_waiting(0)
    assert on_cpu.last == [None]


def test_on_the_cpu_there_is_one_order(streams: RecordedStreams) -> None:
    filling = packing(device="cpu")
    filling.note_opened(0)
    with streams.stream("second"):
        filling.note_waiting(0)
        filling.note_read([torch.ones(2)])
    filling.join(0)
    assert streams.log == []
    assert not streams.used_on
