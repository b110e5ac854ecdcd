"""Streams of a device, for code that is not told on which of them it runs. On the CPU there are none."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor


def has_streams(device: torch.device) -> bool:
    """Whether work on a device is queued."""
    return device.type not in ("cpu", "meta")


def current_stream(device: torch.device) -> Any:
    """The stream on which this thread computes on a device. Torch takes microseconds to make one into an object; on CUDA those that have
    been made are kept, by what CUDA calls them on their device, which stands for one and the same stream as long as there is one."""
    tell = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if device.type != "cuda" or device.index is None or tell is None:
        return torch.get_device_module(device).current_stream(device)
    place = device.index, tell(device.index)
    stream = _streams.get(place)
    if stream is None:
        stream = _streams[place] = torch.get_device_module(device).current_stream(device)
    return stream


_streams: dict[tuple[int, object], Any] = {}


def stream_teller(device: torch.device) -> Callable[[], object]:
    """A function that tells on which stream this thread computes on a device, by something that is equal for the same stream alone. For
    what comes once a parameter: torch takes a microsecond to make a stream into an object."""
    tell = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if device.type == "cuda" and device.index is not None and tell is not None:
        return partial(tell, device.index)
    return partial(current_stream, device)


def is_capturing(device: torch.device) -> bool:
    """Whether what is queued now becomes part of a CUDA graph."""
    return device.type == "cuda" and bool(torch.get_device_module(device).is_current_stream_capturing())


def capture_number(device: torch.device) -> int:
    """Of which CUDA graph what is queued now becomes part: a number that no other capture of this process has. 0: of none."""
    return _number_of_capture(current_stream(device)) if is_capturing(device) else 0


def _number_of_capture(stream: Any) -> int:
    """Of a stream that is captured; torch does not tell it. 1 where the driver cannot be asked."""
    driver = _driver()
    if driver is None:
        return 1
    status, number = ctypes.c_int(), ctypes.c_uint64()
    pointer = ctypes.c_void_p(stream.cuda_stream)
    failed = driver.cuStreamGetCaptureInfo(pointer, ctypes.byref(status), ctypes.byref(number))
    return 1 if failed else number.value


@cache
def _driver() -> ctypes.CDLL | None:
    """That of CUDA, which torch has loaded."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if hasattr(driver, "cuStreamGetCaptureInfo") else None


def let_wait(waiting: Any, stream: Any, device: torch.device) -> None:
    """Let a stream come behind all that is queued on another one so far."""
    event = torch.get_device_module(device).Event()
    event.record(stream)
    event.wait(waiting)


def note_use(tensor: Tensor) -> None:
    """Tell the allocator that the current stream uses a tensor, which another one may have allocated: when it is dropped, its memory goes
    to nobody else before this stream is through."""
    # Memory that was handed over as it is (`own_storage`) has another owner, who keeps it, and cannot grow. torch's allocator is not
    # interested in it, and that of `backend:cudaMallocAsync` takes it for an error.
    if has_streams(tensor.device) and tensor.untyped_storage().resizable():
        tensor.record_stream(current_stream(tensor.device))


class ReadByGraphs:
    """What CUDA graphs read whenever they are replayed, which nobody here sees. It stays where it is as long as this lives."""

    def __init__(self) -> None:
        self._kept: dict[int, object] = {}

    def note(self, thing: object, device: torch.device) -> None:
        """The current stream of a device reads something. Where a graph is captured, it stays."""
        if is_capturing(device):
            self._kept[id(thing)] = thing

    def __contains__(self, thing: object) -> bool:
        return id(thing) in self._kept


class Mark:
    """The place which the current stream has come to, for others to come behind it. Without streams there is nothing to it.

    Attributes:
        passed_by: the streams whose further work comes behind it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_streams = has_streams(device)
        self.passed_by: list[Any] = []
        if self._has_streams:
            self.passed_by.append(current_stream(device))
            self._capture = capture_number(device)
            self._event = torch.get_device_module(device).Event()
            self._event.record(self.passed_by[0])

    def is_past(self) -> bool:
        """Whether all before it is through, and nobody has to wait; no where the host must not ask, because of a CUDA graph."""
        if not self._has_streams:
            return True
        return not self._capture and not is_capturing(self._device) and bool(self._event.query())

    def wait(self, *streams: Any) -> None:
        """Let the current stream wait, and these."""
        if not self._has_streams:
            return
        for stream in (current_stream(self._device), *streams):
            if stream not in self.passed_by:
                # When a graph is captured, all is over that came before; in it, only what belongs to it can be waited for. What another
                # graph has begun is over when this one is replayed behind it.
                if self._capture == capture_number(self._device):
                    self._event.wait(stream)
                self.passed_by.append(stream)
