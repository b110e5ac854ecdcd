"""Streams of a device, for code that is not told on which of them it runs. On the CPU they are empty shells."""

from __future__ import annotations

from typing import Any

import torch


def current_stream(device: torch.device) -> Any:
    """The stream on which this thread computes on a device."""
    return torch.get_device_module(device).current_stream(device)


def event_on(stream: Any, device: torch.device) -> Any:
    """An event that is over when a stream is through with all that is queued on it so far."""
    event = torch.get_device_module(device).Event()
    event.record(stream)
    return event


def is_capturing(device: torch.device) -> bool:
    """Whether what is queued now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
