"""What `torch.distributed.checkpoint` wants of an optimizer, when it asks for its state or brings it.

It says so nowhere but in the frames of its own functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from .. import ops
from ..errors import NotSupportedError
from ..storage.masters import MASTER_NAMES

_PACKAGE = "torch.distributed.checkpoint"
_MODULE = _PACKAGE + ".state_dict"


def wants_parts(caller: FrameType | None) -> bool:
    """Whether torch.distributed.checkpoint asks, which wants each rank's part from each rank.

    Args:
        caller: of `state_dict()`.
    """
    return _module_of(_asking(caller)).startswith(_PACKAGE + ".")


def takes_state_alone(caller: FrameType | None) -> bool:
    """Whether `get_optimizer_state_dict` asks, which keeps "state" and "param_groups" of a state dict, and nothing else.

    Args:
        caller: of `state_dict()`.
    """
    return _module_of(_asking(caller)) == _MODULE


def _asking(caller: FrameType | None) -> FrameType | None:
    """The frame that called, through whatever torch has wrapped around the method (`no_grad`, or to keep dynamo out)."""
    while (
        caller is not None and _module_of(caller).startswith("torch.") and not _module_of(caller).startswith(_PACKAGE)
    ):
        caller = caller.f_back
    return caller


def _module_of(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__"))


def ranks_that_want_all(caller: FrameType | None, world_size: int) -> Sequence[int]:
    """The ranks on which `get_optimizer_state_dict` was called with `full_state_dict=True` and returns something; none where it
    was not.

    It gathers DTensors, and takes any other tensor for a whole one, without asking it.

    Args:
        caller: of `state_dict()`.

    Raises:
        NotSupportedError: `set_optimizer_state_dict` was called with `full_state_dict=True`: it fails on ranks that have nothing
            of a parameter.
    """
    caller = _asking(caller)
    if caller is None or _module_of(caller) != _MODULE:
        return ()
    info = caller.f_locals.get("info")
    if getattr(info, "full_state_dict", False):
        return (0,) if getattr(info, "cpu_offload", False) else range(world_size)
    frame = caller.f_back
    while frame is not None:
        # It asks for state to be filled with nothing but this option, which it has taken out of `info` meanwhile.
        if frame.f_code.co_name == "_load_optim_state_dict" and _module_of(frame) == _MODULE:
            raise NotSupportedError(
                "StateDictOptions(full_state_dict=True) and broadcast_from_rank0 do not load into a ZeroOptimizer: leave them "
                "out and give the full state dict on every rank (torch.load with mmap=True reads no more of it than is needed)"
            )
        frame = frame.f_back
    return ()


def with_flattened_names(caller: FrameType | None, state_dict: Any) -> Any:
    """A state dict for `load_state_dict` as it was before `flatten_optimizer_state_dict`.

    torch unflattens the names that the optimizer's state has now: of a run with other precision it drops what completes
    parameters, and puts empty dicts where it finds nothing.

    Args:
        caller: of `load_state_dict()`.
    """
    caller = _asking(caller)
    flat = None if caller is None or _module_of(caller) != _MODULE else caller.f_locals.get("state_dict")
    if not isinstance(flat, Mapping) or "state" in flat or not isinstance(state_dict, Mapping):
        return state_dict
    state = {}
    for param, entry in state_dict["state"].items():
        keys = {name: f"state.{param}.{name}" for name in (*MASTER_NAMES, *sorted(ops.SCALES))}
        found = {name: flat[key] for name, key in keys.items() if key in flat}
        state[param] = {name: value for name, value in entry.items() if not isinstance(value, dict) or value} | found
    return {**state_dict, "state": state}
