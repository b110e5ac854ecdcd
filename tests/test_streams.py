"""A stream comes behind a mark once, and not across the borders of a CUDA graph."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from recorded_streams import recorded_streams

from zeroopt.streams import (
    Mark,
    _number_of_capture,
    capture_number,
    current_stream,
    has_streams,
    note_use,
    stream_teller,
)

CUDA = torch.device("cuda")
Numbers = ctypes.POINTER(ctypes.c_uint64)


def test_each_stream_waits_once() -> None:
    with recorded_streams() as streams:
        mark = Mark(CUDA)
        mark.wait()
        assert streams.log == []  # its own
        for _ in range(2):
            with streams.stream("other"):
                mark.wait("third")
        assert streams.log == ["other waits for main", "third waits for main"]
        assert mark.passed_by == ["main", "other", "third"]


def test_streams_are_told_apart() -> None:
    with recorded_streams() as streams:
        for device in (CUDA, torch.device("cuda", 1), torch.device("xpu", 0)):
            tell = stream_teller(device)
            main = tell()
            with streams.stream("other"):
                assert tell() != main
                assert tell() == tell()
            assert tell() == main


def test_a_stream_is_made_into_an_object_once() -> None:
    devices = torch.device("cuda", 6), torch.device("cuda", 7)
    with recorded_streams() as streams, patch.object(streams, "current_stream", wraps=streams.current_stream) as made:
        for _ in range(2):
            for device in devices:
                assert current_stream(device) == "main"
                with streams.stream("other"):
                    assert current_stream(device) == "other"
        assert made.call_count == 4
        assert current_stream(torch.device("xpu", 6)) == "main" and made.call_count == 5


def test_what_a_graph_is_captured_behind_is_over() -> None:
    with recorded_streams() as streams:
        before = Mark(CUDA)
        with streams.stream("graph"):
            before.wait()
            within = Mark(CUDA)
        within.wait()
        assert streams.log == []


def test_a_graph_waits_for_what_belongs_to_it() -> None:
    with recorded_streams() as streams, streams.stream("graph"):
        mark = Mark(CUDA)
        streams.captured.add("fork")
        with streams.stream("fork"):
            mark.wait()
        assert streams.log == ["fork waits for graph"]


def test_the_host_asks_whether_a_mark_is_over_outside_of_graphs_alone() -> None:
    with recorded_streams() as streams:
        mark = Mark(CUDA)
        assert not mark.is_past()
        streams.is_through = True
        assert mark.is_past()
        with streams.stream("graph"):
            assert not mark.is_past()
            captured = Mark(CUDA)
        assert not captured.is_past()
        assert Mark(torch.device("cpu")).is_past()


def test_a_graph_does_not_wait_for_another_one() -> None:
    number_of = {"graph": 1, "another graph": 2}
    with recorded_streams() as streams, patch("zeroopt.streams._number_of_capture", number_of.__getitem__):
        streams.captured.add("another graph")
        with streams.stream("graph"):
            mark = Mark(CUDA)
        with streams.stream("another graph"):
            assert capture_number(CUDA) == 2
            mark.wait()
        assert capture_number(CUDA) == 0
        assert streams.log == []


@pytest.mark.parametrize(("failed", "number"), [(0, 41), (1, 1)])
def test_the_driver_says_in_which_capture_a_stream_is(failed: int, number: int) -> None:
    asked = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), Numbers)
    def answer(stream: int, status: Any, capture: Any) -> int:
        asked.append(stream)
        status[0], capture[0] = 1, 41
        return failed

    stream = SimpleNamespace(cuda_stream=2**40 + 7)
    with patch("zeroopt.streams._driver", lambda: SimpleNamespace(cuStreamGetCaptureInfo=answer)):
        assert _number_of_capture(stream) == number
    assert asked == [2**40 + 7]
    with patch("zeroopt.streams._driver", lambda: None):
        assert _number_of_capture(stream) == 1


def test_without_streams_nothing_is_asked_of_them() -> None:
    with recorded_streams() as streams:
        for device in (torch.device("cpu"), torch.device("meta")):
            assert not has_streams(device)
            mark = Mark(device)
            with streams.stream("other"):
                mark.wait()
            assert mark.passed_by == []
        note_use(torch.ones(2))
        assert streams.log == []
        assert not streams.used_on
