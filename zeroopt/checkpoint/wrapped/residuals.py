"""What compression makes a rank keep for itself: it is saved by each rank, and only as many ranks go on from it.

left_out   of gradients, what `gradient_compression` has yet to send
model      of the parameters that a rank steps, what models have of them, which `parameter_compression` lets follow
rounding   by which random numbers codes were rounded
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ...gradients.residuals import LeftOut, collect_residuals, hand_out_residuals
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...replica import Replica
from ...storage.bucket import Bucket
from .contents import clean_name

_PARTS = {"rounding", "left_out", "model"}

Order = list[list[str]]
"""Names of an optimizer's parameters as they were planned, for each time that some were taken in."""


def residual_file(rank: int) -> str:
    """Name of the file with what one rank keeps."""
    return f"residual-{rank}.pt"


def sends_codes(replica: Replica) -> bool:
    """Whether anything travels as codes. The same on all ranks."""
    return replica.compresses or any(_follows_by_codes(bucket) for bucket in replica.buckets)


def _follows_by_codes(bucket: Bucket) -> bool:
    return bucket.precision.parameter_compression is not None


def planned_order(optimizer: ZeroOptimizer) -> Order:
    """That of the buckets, which are what is encoded together."""
    params = optimizer.state_dicts.params
    return [[clean_name(params[number].name) for number in generation] for generation in optimizer.generations]


@contextmanager
def planned_like(orders: Sequence[tuple[ZeroOptimizer, Order]]) -> Iterator[None]:
    """Plan the buckets of optimizers like that, where it can be done, and as they were where what is done within fails on all ranks.
    Collective.
    """
    before = [(optimizer, [list(generation) for generation in optimizer.generations]) for optimizer, _ in orders]
    for optimizer, order in orders:
        _follow_planned_order(optimizer, order)
    try:
        yield
    except CheckpointError:
        for optimizer, numbers in before:
            optimizer.follow_order(numbers)
        raise


def _follow_planned_order(optimizer: ZeroOptimizer, order: Order) -> None:
    place = {clean_name(managed.name): number for number, managed in enumerate(optimizer.state_dicts.params)}
    known = [[place[name] for name in generation if name in place] for generation in order]
    optimizer.follow_order(known)


def residual_contents(model: ZeroDataParallel) -> dict[str, Any]:
    """What this rank keeps; empty where nothing travels as codes. By name of the parameter where it begins in that, and what it is. Not
    collective."""
    replica = model.replica
    if not sends_codes(replica):
        return {}
    found = collect_residuals(replica.reducer.stores, replica.reducer.buckets)
    left_out = {clean_name(managed.name): _piece(left.start, left.values) for managed, left in found.items()}
    return {"rounding": replica.rounding.save(), "left_out": left_out, "model": dict(_model_pieces(replica.buckets))}


def _model_pieces(buckets: Sequence[Bucket]) -> Iterator[tuple[str, dict[str, Any]]]:
    for bucket in filter(_follows_by_codes, buckets):
        own = bucket.own_param.clone()  # what is written is all of the memory that a view is of
        for segment in bucket.segments:
            yield clean_name(segment.owner.name), _piece(segment.start, segment.part_of(own))


def _piece(start: int, values: Tensor) -> dict[str, Any]:
    return {"start": start, "values": values}


def checked_residuals(saved: Any, name: str) -> dict[str, Any]:
    """What was read from a file, as `residual_contents` makes it. The first checkpoints that had any have `left_out` alone, by itself.

    Raises:
        CheckpointError: it is something else.
    """
    is_named = isinstance(saved, dict) and (not saved or not _PARTS.isdisjoint(saved))
    kept: dict[str, Any] = saved if is_named else {"left_out": saved}
    for what in ("left_out", "model"):
        pieces = kept.get(what, {})
        if not (isinstance(pieces, dict) and all(map(_is_piece, pieces.values()))):
            raise CheckpointError(f"{name} does not hold what a rank keeps for itself, but {what}: {pieces!r}")
    return kept


def _is_piece(saved: Any) -> bool:
    start, values = (saved.get(key) for key in ("start", "values")) if isinstance(saved, dict) else (None, None)
    return isinstance(start, int) and start >= 0 and isinstance(values, Tensor) and values.dim() == 1


def restore_residuals(model: ZeroDataParallel, saved: Mapping[str, Any]) -> None:
    """Let this rank keep what was saved, as far as it sends the same elements, and nothing else. Collective.

    Args:
        saved: empty where there is nothing to go on from.
    """
    replica = model.replica
    if "rounding" in saved:
        replica.rounding.load(saved["rounding"])
    stores, buckets = replica.reducer.stores, replica.reducer.buckets
    for store in stores:
        if store.residual is not None:
            store.residual.drop()
    found = {}
    for managed in replica.params:
        entry = saved.get("left_out", {}).get(clean_name(managed.name))
        if entry is not None:
            found[managed] = LeftOut(entry["start"], entry["values"].to(managed.local.device))
    hand_out_residuals(found, stores, buckets)
    if any(map(_follows_by_codes, replica.buckets)):
        _restore_model(model, saved.get("model", {}))


def _restore_model(model: ZeroDataParallel, saved: Mapping[str, Any]) -> None:
    """Let the model lag behind the exact values as it did. Collective."""
    with ExitStack() as rewriting:
        for optimizer in model.optimizers:
            rewriting.enter_context(optimizer.rewriting_parameters(exact=False))
        for bucket in filter(_follows_by_codes, model.replica.buckets):
            for segment in bucket.segments:
                entry = saved.get(clean_name(segment.owner.name))
                if entry is not None and (entry["start"], entry["values"].numel()) == (segment.start, segment.numel):
                    segment.part_of(bucket.own_param).copy_(entry["values"])
