"""ZeRO stages 1 and 2 for PyTorch: shard the state of a torch optimizer with one line.

    model, optimizer = zeroopt.wrap(model, optimizer)

In reading order; each imports from those above it:

    source_folder     the package imported where there are no kernels
    errors            the exceptions
    named_function    what `module:function` names on a command line
    profiling         ranges for torch's profiler
    untraced          what torch.compile has to leave alone
    weak_methods      methods that are called back without keeping their object alive
    streams           streams of a device
    transfers         numbers between host and device
    pages             memory in pages of its own
    own_storage       parts of a tensor that look as if torch had made each by itself
    ops               typed functions over the compiled kernels
    options           what a user asked for
    collectives       transports: how ranks reach each other
    data              in which order samples are trained on
    plan              which element lies where, and who owns it
    probing           what an optimizer does, found by trying
    storage           the memory of buckets
    feature           what a user may switch on takes part in a backward and a step by these calls
    parameters        parameters and buffers from a step to the next forward
    gradients         from autograd to sums
    stepping          one step on what a rank owns
    state             what a rank's state is to others
    optim             the fused kernels as ordinary optimizers
    admission         what may be wrapped
    building          a model on the meta device gets its values
    replica           a wrapped model on this rank: its buckets, and what carries them
    trained           what one optimizer trains of it
    features          what a user may switch on
    diagnosis         what is held where, for people
    inner_attributes  what of the wrapped optimizer is reachable
    optimizer         what `wrap` returns: the optimizer
    ddp_around        DistributedDataParallel put around it
    module            what `wrap` returns: the model
    checkpoint        directories of checkpoints
    elastic           going on after ranks were killed, from memory
    wrap              `wrap`
    unwrap            `unwrap`
    integrations      frameworks that people train in
    planner           what a training will hold, before there is one
    simulator         how long its steps will take
    __main__          the command line

A folder lists its files likewise. CONTRIBUTING.md says what goes where.
"""

from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401  first: the kernels then share the OpenMP runtime that torch brought

from .source_folder import check_kernels

check_kernels()  # before anything asks for them

from . import data, ops, optim
from ._C import build_info
from .building.functions import reset_parameters
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
from .feature import Feature
from .module import ZeroDataParallel
from .optimizer import ZeroOptimizer
from .options.splits import Split
from .unwrap import unwrap
from .wrap import wrap

if TYPE_CHECKING:
    from . import checkpoint, elastic
    from .planner import estimate_memory

__version__: str = build_info()["version"]


def __getattr__(name: str) -> Any:
    """Find `zeroopt.checkpoint`, `zeroopt.elastic` and `zeroopt.estimate_memory` when they are first used: importing them takes long,
    for they import DCP, and what traces models."""
    from importlib import import_module

    if name in ("checkpoint", "elastic"):
        return import_module(f"zeroopt.{name}")
    if name == "estimate_memory":
        return import_module("zeroopt.planner").estimate_memory
    raise AttributeError(f"module 'zeroopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers: public names, those found later included, without the folders and files behind them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


__all__ = [
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "Feature",
    "KernelUnavailableError",
    "NonFiniteError",
    "NotSupportedError",
    "RankMismatchError",
    "Split",
    "StateError",
    "ZeroDataParallel",
    "ZeroOptError",
    "ZeroOptimizer",
    "__version__",
    "build_info",
    "checkpoint",
    "data",
    "elastic",
    "estimate_memory",
    "ops",
    "optim",
    "reset_parameters",
    "unwrap",
    "wrap",
]
