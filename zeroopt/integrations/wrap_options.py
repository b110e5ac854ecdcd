"""What all frameworks have to know of the options of `zeroopt.wrap`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..wrap import wrap

WRAP_OPTIONS = frozenset(inspect.signature(wrap).parameters) - {"model", "optimizer"}
_OF_THE_MODEL = frozenset({"features", "init", "device"})


def for_further_optimizer(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for a second optimizer of a model: what is the model's was given with its first."""
    return {name: value for name, value in options.items() if name not in _OF_THE_MODEL}


def has_meta(model: nn.Module) -> bool:
    """Whether parts of it are on the meta device."""
    return any(tensor.is_meta for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
