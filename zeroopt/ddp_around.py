"""DistributedDataParallel around a wrapped model, where frameworks put it: gradients would be averaged twice."""

from __future__ import annotations

from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import ConfigError


def check_ddp_around(params: Iterable[nn.Parameter]) -> None:
    """Raise ConfigError within the forward of a DistributedDataParallel that averages the gradients of these parameters."""
    outer: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if outer is not None and not {*map(id, params)}.isdisjoint(map(id, outer._module_parameters)):
        refuse_ddp_around()


def is_of_ddp(frame: FrameType) -> bool:
    """Whether code of DistributedDataParallel runs there."""
    return frame.f_globals.get("__name__") == DistributedDataParallel.__module__


def refuse_ddp_around() -> None:
    """Raise ConfigError."""
    raise ConfigError(
        "a model that zeroopt.wrap returned was put into DistributedDataParallel, perhaps by Accelerate's prepare() or a Trainer: "
        "zeroopt averages gradients itself. Leave DistributedDataParallel out, and give wrapped models to no such "
        "functions; zeroopt.unwrap gives back the plain model and optimizer"
    )
