"""axolotl trains with zeroopt: a plugin that its configuration names, and which enables zeroopt in the Trainer that axolotl builds.

plugins:
  - zeroopt.integrations.axolotl.ZerooptPlugin
zeroopt:
  stage: 2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError
from .transformers import enable

try:
    from axolotl.integrations.base import BasePlugin
except ImportError as error:
    raise ImportError("zeroopt.integrations.axolotl needs axolotl (written for 0.19.0): pip install axolotl") from error

from pydantic import BaseModel

__all__ = ["ZerooptPlugin"]

_DTYPES = ("param_dtype", "reduce_dtype", "state_dtype")


class ZerooptArgs(BaseModel):
    """What the plugin adds to axolotl's configuration.

    Attributes:
        zeroopt: the options of `zeroopt.integrations.transformers.enable`; dtypes by name, such as bfloat16.
    """

    zeroopt: dict[str, Any] | None = None


class ZerooptPlugin(BasePlugin):  # type: ignore[misc]
    """Enables zeroopt in each Trainer that axolotl creates."""

    def get_input_args(self) -> str:
        """Where axolotl finds what the plugin adds to its configuration."""
        return f"{__name__}.{ZerooptArgs.__name__}"

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        """Called on every rank. Raises what `zeroopt.integrations.transformers.enable` raises."""
        enable(trainer, **options_of(cfg.get("zeroopt") or {}))


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as YAML has them, for `enable`.

    Raises:
        ConfigError: a dtype of a name that torch does not have.
    """
    options = dict(given)
    for name in _DTYPES:
        if isinstance(options.get(name), str):
            options[name] = _dtype(name, options[name])
    return options


def _dtype(option: str, name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"expected {option} of zeroopt: to be the name of a dtype, such as bfloat16, got {name!r}")
    return found
