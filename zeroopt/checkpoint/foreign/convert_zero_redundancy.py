"""State of torch's ZeroRedundancyOptimizer as the state dict of a plain torch optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import StateError
from .plain_state import check_shape, whole_state_dict

StateDict = Mapping[str, Any]


def from_zero_redundancy(saved: StateDict | Sequence[StateDict], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `torch.distributed.optim.ZeroRedundancyOptimizer` has saved, as the state dict of a plain torch optimizer.

    Not collective; changes nothing, and shares tensors with what it is given. Read its files with
    `torch.load(path, map_location="cpu", weights_only=True, mmap=True)`: they hold tensors and plain values, so nothing
    has to be unpickled freely, and a rank that goes on to `optimizer.load_state_dict` has only its own part in memory.

    Args:
        saved: its `state_dict()` on the rank to which state was consolidated; or, without consolidation, what
            `zero.optim.state_dict()` gave on each rank, in rank order.
        optimizer: the one to load into, wrapped or not, over the same parameters in the same order and groups.

    Returns:
        State by position, and param_groups, with the saved options but for how torch is to compute (`foreach`, …).

    Raises:
        StateError: it belongs to other parameters or groups, shards of ranks are missing, or it is no state dict.
    """
    _check_form(saved)
    params = [[*group["params"]] for group in optimizer.param_groups]
    if isinstance(saved, Mapping):
        _check_groups([saved], [params])
        state, options = saved["state"], saved["param_groups"]
    else:
        state, options = _join(saved, params)
    flat = [param for group in params for param in group]
    # Of parameters of other ranks, a ZeroRedundancyOptimizer that has loaded state keeps None.
    state = {position: entry for position, entry in state.items() if entry}
    for position, entry in state.items():
        _check_entry(position, entry, flat)
    return whole_state_dict(optimizer, state, options)


def _check_form(saved: Any) -> None:
    """Raise StateError where something is no state dict, or not a list of them."""
    shards = [saved] if isinstance(saved, Mapping) else saved
    if not isinstance(shards, Sequence) or isinstance(shards, (str, bytes)):
        raise StateError(f"expected a state dict, or a list with that of each rank, got {type(saved).__name__}")
    for number, shard in enumerate(shards):
        if not (
            isinstance(shard, Mapping) and _is_state(shard.get("state")) and _are_groups(shard.get("param_groups"))
        ):
            of = "" if shards is not saved else f" in place {number} of the list"
            raise StateError(
                f"expected a state dict{of}, with 'state' by position of the parameter and 'param_groups' that have 'params', got "
                f"{type(shard).__name__}{f' of {sorted(map(str, shard))[:5]}' if isinstance(shard, Mapping) else ''}"
            )


def _is_state(state: Any) -> bool:
    # Of parameters of other ranks there may be None.
    return isinstance(state, Mapping) and all(
        type(position) is int and (entry is None or isinstance(entry, Mapping)) for position, entry in state.items()
    )


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, Sequence) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), Sequence) for group in groups
    )


def _check_position(position: int, count: int, of: str) -> None:
    if not 0 <= position < count:
        raise StateError(f"{of} has state of parameter {position}, the optimizer has {count}")


def _check_entry(position: int, entry: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    _check_position(position, len(params), "the state dict")
    for key, value in entry.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            check_shape(str(position), key, value, params[position], "the state dict")


def _join(shards: Sequence[StateDict], params: Sequence[Sequence[Tensor]]) -> tuple[dict[int, Any], list[Any]]:
    """State by position, and options, of the local optimizers of all ranks."""
    if not shards:
        raise StateError("expected a state dict of each rank, got none")
    owned = [list(_owned(params, rank, len(shards))) for rank in range(len(shards))]
    _check_groups(shards, [[[p for _, p in group] for group in groups] for groups in owned])
    state: dict[int, Any] = {}
    for rank, (shard, groups) in enumerate(zip(shards, owned, strict=True)):
        positions = [position for group in groups for position, _ in group]
        for local in shard["state"]:
            _check_position(local, len(positions), f"the state dict of rank {rank} of {len(shards)}")
        state |= {positions[local]: entry for local, entry in shard["state"].items()}
    return state, shards[0]["param_groups"]


def _check_groups(shards: Sequence[StateDict], expected: Sequence[Sequence[Sequence[Tensor]]]) -> None:
    for rank, (shard, groups) in enumerate(zip(shards, expected, strict=True)):
        found = [len(group["params"]) for group in shard["param_groups"]]
        if found != [len(group) for group in groups]:
            of = "the state dict" if len(shards) == 1 else f"the state dict of rank {rank} of {len(shards)}"
            raise StateError(
                f"{of} has param_groups of {found} parameters, expected {[len(group) for group in groups]}: pass the "
                "state dicts of all ranks, in their order, and an optimizer over the same parameters in the same groups"
            )


def _owned(params: Sequence[Sequence[Tensor]], rank: int, world_size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Positions and parameters of a rank, for each group, in the order of its local optimizer.

    As `ZeroRedundancyOptimizer._partition_parameters` hands them out: in each group the largest first, each to the rank
    that has the fewest elements by then.
    """
    numels = [0] * world_size
    first = 0
    for group in params:
        own = []
        for position, param in sorted(enumerate(group, first), key=lambda item: -item[1].numel()):
            owner = numels.index(min(numels))
            numels[owner] += param.numel()
            if owner == rank:
                own.append((position, param))
        yield own
        first += len(group)
