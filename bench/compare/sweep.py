"""What a sweep varies, and over which values where nobody says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.compare.formula import replicated
from bench.compare.setting import Setting
from bench.machine import available_bytes

MEMORY_PART = (
    0.7  # of what is free, for the largest model under DDP: activations and buckets come on top of the formula
)


@dataclass(frozen=True)
class Axis:
    """One thing that differs between settings.

    Attributes:
        of: its value, a number.
        option: of the command line, which takes several values.
        values: of that option.
    """

    title: str
    of: Callable[[Setting], float]
    option: str
    values: Sequence[Any]


AXES = {
    "parameters": Axis(
        "parameters",
        lambda setting: setting.parameters,
        "model",
        ("1M", "3M", "10M", "30M", "100M", "300M", "1B", "3B", "10B"),
    ),
    "ranks": Axis("ranks", lambda setting: setting.world_size, "world_sizes", (1, 2, 3, 4, 6, 8)),
    "tokens": Axis(
        "tokens a rank and step",
        lambda setting: setting.tokens * setting.accumulation,
        "tokens",
        (32, 128, 512),
    ),
    "buckets": Axis("MiB of a bucket", lambda setting: setting.bucket_mb or 0, "bucket_mb", (1, 5, 25, 100)),
}


def varied(settings: Sequence[Setting]) -> list[Axis]:
    """The axes along which settings differ."""
    return [axis for axis in AXES.values() if len(set(map(axis.of, settings))) > 1]


def that_fit(settings: Sequence[Setting]) -> list[Setting]:
    """Those that DDP can train in the memory that is free now: a sweep ends where memory does."""
    return [setting for setting in settings if needed_bytes(setting) <= MEMORY_PART * free_bytes(setting.device)]


def needed_bytes(setting: Setting) -> float:
    """Under DDP, of all ranks of a host, or of one on its own device."""
    ranks = setting.world_size if setting.device == "cpu" else 1
    return ranks * setting.parameters * replicated(setting)


def free_bytes(device: str) -> int:
    return available_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]
