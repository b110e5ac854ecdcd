"""What `torch.distributed.checkpoint.state_dict` was asked for, when it asks an optimizer for its state."""

from __future__ import annotations

from types import FrameType

from .errors import NotSupportedError

_MODULE = "torch.distributed.checkpoint.state_dict"


def refuse_full_state(caller: FrameType | None) -> None:
    """Raise NotSupportedError when `get_optimizer_state_dict` or `set_optimizer_state_dict` was called with
    `full_state_dict=True`.

    The former gathers DTensors, and takes any other tensor for a whole one, without asking it; that would leave a state dict
    with one rank's part of each. The latter fails on ranks that have nothing of a parameter. The option is only to be seen
    in their frames.

    Args:
        caller: of `state_dict()`.
    """
    if caller is None or caller.f_globals.get("__name__") != _MODULE:
        return
    if getattr(caller.f_locals.get("info"), "full_state_dict", False):
        raise NotSupportedError(
            "StateDictOptions(full_state_dict=True) does not gather the state of a ZeroOptimizer: call "
            "optimizer.consolidate_state_dict() on all ranks and then optimizer.full_state_dict() on rank 0, or leave the option "
            "out and save with torch.distributed.checkpoint, in which every tensor is whole"
        )
    frame = caller.f_back
    while frame is not None:
        # It asks for state to be filled with nothing but this option, which it has taken out of `info` meanwhile.
        if frame.f_code.co_name == "_load_optim_state_dict" and frame.f_globals.get("__name__") == _MODULE:
            raise NotSupportedError(
                "StateDictOptions(full_state_dict=True) and broadcast_from_rank0 do not load into a ZeroOptimizer: leave them "
                "out and give the full state dict on every rank (torch.load with mmap=True reads no more of it than is needed)"
            )
        frame = frame.f_back
