"""The bytes a parameter that a rank holds, as each method's documents have it: AdamW, N ranks.

Parameters, gradients, float32 masters and two moments, without activations, buckets and what messages take. In bfloat16,
methods that use autocast keep float32 parameters, and a bfloat16 copy of them from forward to backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Setting(Protocol):
    """What formulas ask of a setting. `precision`: "float32" or "bfloat16"."""

    @property
    def world_size(self) -> int: ...

    @property
    def precision(self) -> str: ...


Formula = Callable[[Setting], float]

HOST_RANKS = 8  # at most so many share one copy of the parameters, when many ranks are asked for
MOMENTS = 2 * 4
MASTER_BYTES = {"float32": 4, "remainder": 2, "none": 0}
MOMENT_BYTES = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.int8: 1 + 4 / 256}


def cast_copy(setting: Setting) -> float:
    """What autocast keeps of a parameter."""
    return 2 if setting.precision == "bfloat16" else 0


def without_state(setting: Setting) -> float:
    """Plain SGD, no communication: parameters and gradients, both in the precision."""
    return 4 if setting.precision == "bfloat16" else 8


def replicated(setting: Setting) -> float:
    """DDP with bucket views, or no communication at all."""
    return 4 + cast_copy(setting) + 4 + MOMENTS


def with_separate_buckets(setting: Setting) -> float:
    """DDP's default: gradients exist in `param.grad` and in the buckets."""
    return replicated(setting) + 4


def sharded_state(setting: Setting) -> float:
    """ZeroRedundancyOptimizer with DDP's bucket views (ZeRO: Rajbhandari et al., 2020, section 5.1)."""
    return 4 + cast_copy(setting) + 4 + MOMENTS / setting.world_size


def sharded_gradients(setting: Setting) -> float:
    """fairscale's ShardedDDP with OSS (section 5.2)."""
    return 4 + cast_copy(setting) + (4 + MOMENTS) / setting.world_size


def fsdp(setting: Setting) -> float:
    """Sharded float32 parameters, gradients and moments, beside the gathered parameters."""
    gathered = 2 if setting.precision == "bfloat16" else 4
    return gathered + (4 + 4 + MOMENTS) / setting.world_size


def deepspeed(stage: int) -> Formula:
    """A float32 master of each partition, in float32 too; stage 1 keeps all gradients."""

    def formula(setting: Setting) -> float:
        held = 2 if setting.precision == "bfloat16" else 4
        gradients = held if stage == 1 else 0
        return held + gradients + (4 + 4 + MOMENTS) / setting.world_size

    return formula


def zero(
    stage: int,
    share_parameters: bool = False,
    master_weights: str = "float32",
    state_dtype: torch.dtype = torch.float32,
    step_in_backward: bool = False,
) -> Formula:
    """zeroopt's own, as its README has them."""

    def formula(setting: Setting) -> float:
        world_size, half = setting.world_size, setting.precision == "bfloat16"
        held = 2 if half else 4
        parameters = held / min(world_size, HOST_RANKS) if share_parameters else held
        full = held if stage < 2 else 0
        keeps_sums = (stage == 2 and not step_in_backward) or (stage == 1 and half)
        sums = 4 / world_size if keeps_sums else 0
        master = MASTER_BYTES[master_weights] if half else 0
        return parameters + full + sums + (master + 2 * MOMENT_BYTES[state_dtype]) / (world_size if stage else 1)

    return formula
