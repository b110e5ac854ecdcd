"""ZeRO stages 1 and 2 for PyTorch: shard the state of a torch optimizer with one line.

    model, optimizer = zeroopt.wrap(model, optimizer)

CONTRIBUTING.md lists the files in reading order.
"""

import torch as _torch  # noqa: F401  first: the kernels then share the OpenMP runtime that torch brought

from . import ops, optim
from ._C import build_info
from .errors import (
    CheckpointError,
    CollectiveError,
    ConfigError,
    KernelUnavailableError,
    NonFiniteError,
    NotSupportedError,
    RankMismatchError,
    StateError,
    ZeroOptError,
)
from .module import ZeroDataParallel
from .optimizer import ZeroOptimizer
from .unwrap import unwrap
from .wrap import wrap

__version__: str = build_info()["version"]

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "KernelUnavailableError",
    "NonFiniteError",
    "NotSupportedError",
    "RankMismatchError",
    "StateError",
    "ZeroDataParallel",
    "ZeroOptError",
    "ZeroOptimizer",
    "__version__",
    "build_info",
    "ops",
    "optim",
    "unwrap",
    "wrap",
]
