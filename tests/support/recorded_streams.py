"""Streams that are names, and a log of who waits for whom, in the place of those of a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor


class RecordedStreams:
    """Stands in for torch.cuda: streams are names, and what happens to them is written down.

    Attributes:
        current: the name of the current stream.
        used_on: tensors of which the allocator has been told, by stream.
        captured: streams that are part of a graph, as those become that wait for one.
        log: one line each.
        is_through: all that was queued is over.
    """

    def __init__(self) -> None:
        self.current = "main"
        self.captured = {"graph"}
        self.used_on: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.log: list[str] = []
        self.is_through = False

    def Stream(self, device: torch.device, priority: int) -> str:
        assert priority < 0  # which is a high one
        return "side"

    def Event(self) -> RecordedEvent:
        return RecordedEvent(self)

    def current_stream(self, device: torch.device) -> str:
        return self.current

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def is_current_stream_capturing(self) -> bool:
        return self.current in self.captured

    def note(self, what: str) -> None:
        self.log.append(f"{what} on {self.current}")


class RecordedEvent:
    def __init__(self, streams: RecordedStreams) -> None:
        self._streams = streams
        self._after = ""

    def record(self, stream: str) -> None:
        self._after = stream

    def query(self) -> bool:
        return self._streams.is_through

    def wait(self, stream: str) -> None:
        self._streams.log.append(f"{stream} waits for {self._after}")
        if self._after in self._streams.captured:
            self._streams.captured.add(stream)


@contextmanager
def recorded_streams() -> Iterator[RecordedStreams]:
    """Within it, every device has these streams, and tensors of the CPU may be said to be used on them."""
    streams = RecordedStreams()
    with (
        patch("torch.get_device_module", lambda _: streams),
        patch("torch._C._cuda_getCurrentRawStream", lambda _: streams.current, create=True),
        patch.object(torch.Tensor, "record_stream", lambda tensor, stream: streams.used_on[stream].append(tensor)),
    ):
        yield streams
