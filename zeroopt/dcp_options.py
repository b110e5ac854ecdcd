"""What `torch.distributed.checkpoint.state_dict` was asked for, when it asks an optimizer for its state."""

from __future__ import annotations

from types import FrameType

from .errors import NotSupportedError


def refuse_gathering(caller: FrameType | None) -> None:
    """Raise NotSupportedError when `get_optimizer_state_dict` is to return whole tensors.

    It gathers DTensors, and takes any other tensor for a whole one, without asking it; that would leave a state dict with one
    rank's part of each. The option is only to be seen in its frame.

    Args:
        caller: of `state_dict()`.
    """
    if caller is None or caller.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        return
    if getattr(caller.f_locals.get("info"), "full_state_dict", False):
        raise NotSupportedError(
            "StateDictOptions(full_state_dict=True) does not gather the state of a ZeroOptimizer: call "
            "optimizer.consolidate_state_dict() on all ranks and then optimizer.full_state_dict() on rank 0, or leave the option "
            "out and save with torch.distributed.checkpoint, in which every tensor is whole"
        )
