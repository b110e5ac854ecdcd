"""The options of outer steps: what `average_every` does beyond taking a mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from ..errors import ConfigError
from .checks import check_one_of
from .precision import CODE_BITS

if TYPE_CHECKING:
    from .config import Config

OuterFactory: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes the outer optimizer of its parameters, which are flat: a class, or a function."""

OUTER_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, *CODE_BITS)
_KEPT_WITH_A_DELAY = 0.5  # what Douillard et al. 2025 train with


def check_outer(config: Config) -> None:
    """Raise ConfigError unless the options of outer steps go together."""
    if config.outer_optimizer is None:
        for name, default in (
            ("outer_fragments", 1),
            ("outer_delay", 0),
            ("outer_mixing", None),
            ("outer_dtype", None),
        ):
            given = getattr(config, name)
            if given != default or type(given) is not type(default):
                raise ConfigError(f"{name}={given!r} needs an outer_optimizer, to whose steps it belongs")
        return
    if not callable(config.outer_optimizer) or isinstance(config.outer_optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "expected outer_optimizer to be a class or a function that makes an optimizer of a list of parameters, such as "
            f"lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True), got {config.outer_optimizer!r}"
        )
    every = config.average_every
    if every is None:
        raise ConfigError("outer_optimizer needs average_every, the number of steps between two outer steps")
    _check_count("outer_fragments", config.outer_fragments, 1, "a positive number of fragments")
    _check_count("outer_delay", config.outer_delay, 0, "a number of steps")
    if config.outer_delay >= every:
        raise ConfigError(
            f"expected outer_delay to be less than average_every={every}, got {config.outer_delay}: a fragment would set out again "
            "before it has arrived"
        )
    mixing = config.outer_mixing
    is_number = isinstance(mixing, (int, float)) and not isinstance(mixing, bool)
    if mixing is not None and not (is_number and 0 <= mixing < 1):
        raise ConfigError(f"expected outer_mixing to be a number in [0, 1) or None, got {mixing!r}")
    check_one_of("outer_dtype", config.outer_dtype, OUTER_DTYPES)
    # 0 and 0.0 are the same option, and read alike wherever ranks compare them.
    object.__setattr__(config, "outer_mixing", None if mixing is None else float(mixing))


def share_kept(config: Config) -> float:
    """What `outer_mixing` comes to: how much of its own parameters a rank keeps when those of an outer step arrive."""
    if config.outer_mixing is not None:
        return config.outer_mixing
    return _KEPT_WITH_A_DELAY if config.outer_delay else 0.0


def _check_count(name: str, value: object, least: int, expected: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"expected {name} to be {expected}, got {value!r}")
