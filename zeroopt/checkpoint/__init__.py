"""Checkpoints: directories that torch.distributed.checkpoint (DCP) reads, there entirely or not at all.

`import zeroopt.checkpoint` to use it: importing zeroopt alone does not import DCP, which takes long.

In reading order; each imports from those above it:

    disk            directories and files
    format          how values are laid out in them
    saved_model     values for a model on the meta device
    wrapped         saving and loading a wrapped model
    foreign         checkpoints of other libraries
    inspection      what is in a checkpoint, for people
    exporting       a checkpoint as one file of torch.save
    exporting_onnx  its model as an ONNX file
    random_state    the random number generators of a process
    stop_request    signals that announce the end
"""

from ..errors import CheckpointError
from .disk.siblings import latest
from .foreign.convert_deepspeed import from_deepspeed
from .foreign.convert_zero_redundancy import from_zero_redundancy
from .random_state import RandomState
from .stop_request import StopRequest
from .wrapped.loading import load
from .wrapped.resuming import resume
from .wrapped.saving import async_save, save

__all__ = [
    "CheckpointError",
    "RandomState",
    "StopRequest",
    "async_save",
    "from_deepspeed",
    "from_zero_redundancy",
    "latest",
    "load",
    "resume",
    "save",
]
