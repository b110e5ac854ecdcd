"""An estimate as tables, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .estimator import Variant
from .phases import PARTS
from .tiers import Options

if TYPE_CHECKING:
    from .estimate import MemoryEstimate

_GB = 1e9


def as_json(estimate: MemoryEstimate) -> dict[str, Any]:
    """All of it, of what `json.dumps` takes. Sizes are bytes."""
    advice = estimate.advice
    return {
        "parameters": estimate.parameters,
        "world_size": estimate.cluster.world_size,
        "host_ranks": estimate.cluster.host_ranks,
        "device": estimate.cluster.device,
        "groups": estimate.cluster.num_groups,
        "shard_ranks": estimate.cluster.shard_ranks,
        "knows_activations": estimate.knows_activations,
        "asked": _variant(estimate.asked),
        "variants": [_variant(variant) for variant in estimate.variants],
        "refused": estimate.refused,
        "advice": None
        if advice is None
        else {
            "memory": advice.memory,
            "fits": advice.variant is not None and not advice.changes,
            "options": None if advice.variant is None else _plain(advice.changes),
            "peak": None if advice.variant is None else advice.variant.training_peak,
            "ranks": advice.ranks,
            "text": advice.lines(),
        },
    }


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "stage": variant.stage,
        "tier": variant.tier,
        "options": _plain(variant.options),
        "transport": variant.transport,
        "buckets": variant.num_buckets,
        "peak": variant.training_peak,
        "peak_phase": variant.peak_of_training.name,
        "phases": {phase.name: {"total": phase.total, **phase.parts} for phase in variant.phases},
    }


def _plain(options: Options) -> Options:
    return {
        name: value if isinstance(value, (bool, int, float, str, type(None))) else str(value).removeprefix("torch.")
        for name, value in options.items()
    }


def lines(estimate: MemoryEstimate) -> list[str]:
    """For people: what was asked for phase by phase, all variants side by side, and the advice."""
    asked, cluster = estimate.asked, estimate.cluster
    without = "" if estimate.knows_activations else ", activations not counted: give tokens or a sample"
    ranks = f"{cluster.world_size} ranks, {cluster.host_ranks} a host, on {cluster.device}"
    ranks += "" if cluster.shard_ranks is None else f", state cut among {cluster.shard_ranks}"
    plan = f"transport {asked.transport}, {asked.num_buckets} buckets"
    said = [
        f"{_count(estimate.parameters)} parameters, {ranks}: {asked}; {plan}",
        f"peak {_size(asked.training_peak)} a rank ({asked.training_peak / estimate.parameters:.2f} bytes a parameter){without}",
        "",
        *_phase_table(asked),
    ]
    if estimate.variants:
        said += ["", f"peaks of training, {_unit(estimate)} (bytes a parameter)", *_variant_table(estimate)]
    if estimate.advice is not None:
        said += ["", *estimate.advice.lines()]
    return said


def _phase_table(variant: Variant) -> list[str]:
    parts = [part for part in PARTS if any(part in phase.parts for phase in variant.phases)]
    rows = [["phase", "total", *parts]]
    for phase in variant.phases:
        name = phase.name + (" *" if phase is variant.peak_of_training else "")
        rows.append([name, _size(phase.total), *(_size(phase.parts[p]) if p in phase.parts else "" for p in parts)])
    return _aligned(rows)


def _variant_table(estimate: MemoryEstimate) -> list[str]:
    columns: dict[str, None] = {}
    cells: dict[str, dict[str, str]] = {}
    for variant in estimate.variants:
        column = f"stage {variant.stage}" + (", shared" if variant.options.get("share_parameters") else "")
        columns[column] = None
        each = variant.training_peak / estimate.parameters
        cells.setdefault(variant.tier, {})[column] = f"{_scaled(variant.training_peak, estimate)} ({each:.2f})"
    return _aligned([["", *columns], *([tier, *(row.get(c, "") for c in columns)] for tier, row in cells.items())])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _unit(estimate: MemoryEstimate) -> str:
    return "GB" if estimate.asked.training_peak >= _GB else "MB"


def _scaled(num_bytes: int, estimate: MemoryEstimate) -> str:
    return f"{num_bytes / _GB:.2f}" if _unit(estimate) == "GB" else f"{num_bytes / 1e6:.1f}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GB:.2f} GB" if num_bytes >= _GB else f"{num_bytes / 1e6:.1f} MB"


def _count(numel: int) -> str:
    return f"{numel / 1e9:.2f} B" if numel >= 1e9 else f"{numel / 1e6:.1f} M"
