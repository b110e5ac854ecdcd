"""Checkpoints: directories that torch.distributed.checkpoint (DCP) reads, there entirely or not at all.

`import zeroopt.checkpoint` to use it: importing zeroopt alone does not import DCP, which takes long.
"""

from ..errors import CheckpointError
from .loading import load
from .saving import async_save, save
from .siblings import latest

__all__ = ["CheckpointError", "async_save", "latest", "load", "save"]
