"""What a sweep varies, and over which values where nobody says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.compare.formula import replicated
from bench.compare.setting import Setting
from bench.compare.summary import Comparison
from bench.machine import available_bytes

MEMORY_PART = (
    0.7  # of what is free, for the largest model under DDP: activations and buckets come on top of the formula
)


@dataclass(frozen=True)
class Axis:
    """One thing that differs between settings.

    Attributes:
        fields: of a setting, that belong to it; all others are the same along a line.
        of: its value in a setting; None where it has none.
        option: of the command line, which takes several values.
        values: of that option, worth looking at.
    """

    name: str
    title: str
    fields: tuple[str, ...]
    of: Callable[[Setting], float | None]
    option: str
    values: Sequence[Any]


AXES = {
    axis.name: axis
    for axis in (
        Axis(
            "parameters",
            "parameters",
            ("layers", "width", "vocabulary"),
            lambda setting: setting.parameters,
            "model",
            ("1M", "3M", "10M", "30M", "100M", "300M", "1B", "3B", "10B"),
        ),
        Axis("ranks", "ranks", ("world_size",), lambda setting: setting.world_size, "world_sizes", (1, 2, 3, 4, 6, 8)),
        Axis(
            "tokens",
            "tokens a rank and step",
            ("tokens", "accumulation"),
            lambda setting: setting.tokens * setting.accumulation,
            "tokens",
            (32, 128, 512),
        ),
        Axis(
            "buckets",
            "MiB of a bucket",
            ("bucket_mb",),
            lambda setting: setting.bucket_mb,
            "bucket_mb",
            (1, 5, 25, 100),
        ),
    )
}


@dataclass(frozen=True)
class Place:
    """A comparison on an axis."""

    value: float
    comparison: Comparison


def short(value: float) -> str:
    """A place on an axis."""
    return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value:g}"


def families(comparisons: Sequence[Comparison], axis: Axis) -> list[list[Place]]:
    """Those that differ in nothing but what the axis varies, in its order; none that has one place with figures only."""
    together: dict[Setting, dict[float, Place]] = {}
    for comparison in comparisons:
        value = axis.of(comparison.setting)
        if value is not None and any(row.problem is None for row in comparison.rows):
            nothing: dict[str, Any] = dict.fromkeys(axis.fields)
            rest = replace(comparison.setting, **nothing)
            together.setdefault(rest, {})[value] = Place(value, comparison)
    return [[places[value] for value in sorted(places)] for places in together.values() if len(places) > 1]


def that_fit(settings: Sequence[Setting]) -> list[Setting]:
    """Those that DDP can train in the memory that is free now: a sweep ends where memory does."""
    return [setting for setting in settings if needed_bytes(setting) <= MEMORY_PART * free_bytes(setting.device)]


def needed_bytes(setting: Setting) -> float:
    """Under DDP, of all ranks of a host, or of one on its own device."""
    ranks = setting.world_size if setting.device == "cpu" else 1
    return ranks * setting.parameters * replicated(setting)


def free_bytes(device: str) -> int:
    return available_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]
