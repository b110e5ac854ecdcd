"""What `gradient_compression` has left out of gradients, which each rank keeps, and saves, for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...gradients.residuals import LeftOut, collect_residuals, hand_out_residuals
from ...module import ZeroDataParallel
from .contents import clean_name


def residual_file(rank: int) -> str:
    """Name of the file with what one rank has left out."""
    return f"residual-{rank}.pt"


def residual_contents(model: ZeroDataParallel) -> dict[str, Any]:
    """What this rank has left out, by the name of the parameter: where it begins in that, and what it is. Empty where it has left out
    nothing. Not collective."""
    reducer = model.replica.reducer
    found = collect_residuals(reducer.stores, reducer.buckets)
    return {clean_name(managed.name): {"start": left.start, "values": left.values} for managed, left in found.items()}


def restore_residuals(model: ZeroDataParallel, saved: Mapping[str, Any]) -> None:
    """Let this rank have left out what was saved, as far as it sends the same elements, and nothing else. Not collective."""
    replica = model.replica
    stores, buckets = replica.reducer.stores, replica.reducer.buckets
    for store in stores:
        if store.residual is not None:
            store.residual.drop()
    found = {}
    for managed in replica.params:
        entry = saved.get(clean_name(managed.name))
        if entry is not None:
            found[managed] = LeftOut(entry["start"], entry["values"].to(managed.local.device))
    hand_out_residuals(found, stores, buckets)
