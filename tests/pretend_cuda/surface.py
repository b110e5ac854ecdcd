"""What a CPU build of torch lacks of `torch.cuda`, for the pretend device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import _device
import torch
from torch import Tensor
from typing_extensions import Self

CUDA_TYPE = 1  # c10::DeviceType::CUDA
WORK = (_device.Kind.LAUNCH, _device.Kind.COPY)


class Stream(torch.Stream):
    """torch.cuda.Stream."""

    def __new__(cls, device: Any = None, priority: int = 0, **where: int) -> Self:
        if where:
            return super().__new__(cls, **where)  # type: ignore[no-any-return]
        return super().__new__(cls, torch.device("cuda", _index(device)), priority=priority)  # type: ignore[no-any-return]

    @property
    def cuda_stream(self) -> int:
        return self.stream_id


def external_stream(pointer: int, device: Any = None) -> Stream:
    """torch.cuda.ExternalStream. 1 is how DLPack calls the default stream."""
    return stream_of(_index(device), 0 if pointer == 1 else pointer)


class Event(torch.Event):
    """torch.cuda.Event."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Self:
        return super().__new__(cls, torch.device("cuda", _device.current_device()))  # type: ignore[no-any-return]

    def record(self, stream: torch.Stream | None = None) -> None:
        super().record(current_stream() if stream is None else stream)

    def wait(self, stream: torch.Stream | None = None) -> None:
        super().wait(current_stream() if stream is None else stream)


def _index(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _device.current_device() if index is None else index


def stream_of(index: int, number: int) -> Stream:
    """A stream of a device, by its number."""
    return Stream(stream_id=number, device_index=index, device_type=CUDA_TYPE)


def current_stream(device: Any = None) -> Stream:
    index = _index(device)
    return stream_of(index, _device.current_stream(index))


def default_stream(device: Any = None) -> Stream:
    return stream_of(_index(device), 0)


def set_stream(stream: torch.Stream) -> None:
    _device.set_stream(stream.device_index, stream.stream_id)
    _device.set_device(stream.device_index)


@contextmanager
def use_stream(stream: torch.Stream | None) -> Iterator[None]:
    """torch.cuda.stream"""
    if stream is None:
        yield
        return
    device, before = _device.current_device(), _device.current_stream(stream.device_index)
    set_stream(stream)
    try:
        yield
    finally:
        _device.set_stream(stream.device_index, before)
        _device.set_device(device)


class use_device:
    """torch.cuda.device"""

    def __init__(self, device: Any) -> None:
        self.idx = _index(device)

    def __enter__(self) -> None:
        self._before = _device.current_device()
        _device.set_device(self.idx)

    def __exit__(self, *_: object) -> None:
        _device.set_device(self._before)


@contextmanager
def host_is_ahead() -> Iterator[None]:
    """Within it, no event has come when the host asks, unless the host has waited for it. Otherwise all have."""
    _device.set_host_ahead(True)
    try:
        yield
    finally:
        _device.set_host_ahead(False)


@contextmanager
def capturing(device: Any = None) -> Iterator[None]:
    """As torch.cuda.graph, on a stream of its own: whatever makes the host wait, or ask, raises, and so does a stream that would wait
    for what is not captured. All else runs, once. In a recording, streams that have not come back to the first one are told at the end.
    """
    index = _index(device)
    synchronize(index)
    stream = Stream(index)
    with use_stream(stream):
        capture = _device.begin_capture(index, stream.stream_id)
        first_node = _device.num_nodes()
        try:
            yield
            if _device.is_on():
                _check_joined(index, stream.stream_id, _device.streams_in(capture), first_node)
        finally:
            _device.end_capture(capture)


class CUDAGraph:
    """torch.cuda.CUDAGraph, of one rank. What is captured runs at once, and that is the first replay, which does nothing more. It may be
    replayed until something else is recorded."""

    def __init__(self) -> None:
        self._num_nodes = 0
        self._replays = 0

    def capture_end(self) -> None:
        self._num_nodes = _device.num_nodes()

    def replay(self) -> None:
        self._replays += 1
        for node in range(self._num_nodes if self._replays > 1 else 0):
            assert _device.run_node(node), "the host has read something else"


@contextmanager
def graph(cuda_graph: CUDAGraph, **_: Any) -> Iterator[None]:
    """torch.cuda.graph"""
    _device.begin()
    try:
        with capturing():
            yield
        cuda_graph.capture_end()
    finally:
        _device.end()
        _device.keep_idle()  # memory of a graph goes to nobody else


def _check_joined(index: int, origin: int, streams: list[int], first_node: int) -> None:
    """Whether the first stream of a capture comes behind what the others have done in it."""
    nodes = _device.nodes()[first_node:]
    first = _device.stream_actor(index, origin)
    behind = next((node.clock for node in reversed(nodes) if node.actor == first), [])
    for stream in streams:
        actor = _device.stream_actor(index, stream)
        done = [node for node in nodes if node.actor == actor and (node.kind in WORK or node.name.startswith("NCCL"))]
        if actor != first and done and (actor >= len(behind) or behind[actor] < done[-1].clock[actor]):
            raise RuntimeError(
                f"capturing stream has unjoined work: {done[-1].name} on {_device.actors()[actor]} at {done[-1].where}"
            )


def _is_capturing() -> bool:
    index = _device.current_device()
    return _device.capture_of(index, _device.current_stream(index)) != 0


def synchronize(device: Any = None) -> None:
    torch.accelerator.synchronize(_index(device))


def get_rng_state(device: Any = "cuda") -> Tensor:
    return torch.get_rng_state()


def set_rng_state(state: Tensor, device: Any = "cuda") -> None:
    torch.set_rng_state(state)


def install() -> None:
    """Put all of it where torch has what refuses to work."""
    cuda = torch.cuda
    names: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "ExternalStream": external_stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_stream": set_stream,
        "stream": use_stream,
        "device": use_device,
        "current_device": _device.current_device,
        "set_device": lambda device: _device.set_device(_index(device)),
        "device_count": lambda: _device.NUM_DEVICES,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "synchronize": synchronize,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: "pretend device",
        "_lazy_init": lambda: None,
    }
    for name, value in names.items():
        setattr(cuda, name, value)
    cuda.graphs._cuda_isCurrentStreamCapturing = _is_capturing  # type: ignore[attr-defined]
    torch._C._cuda_getCurrentRawStream = _device.current_stream  # type: ignore[attr-defined]
    torch.empty(0, device="cuda").cpu()  # so that torch knows of the device
    torch.zeros(0).pin_memory()
