"""The options of `zeroopt.wrap`, checked once and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ConfigError, NotSupportedError
from .precision import Precision

Fused = bool | Literal["auto"]

TRANSPORTS = ("auto", "torch", "pairwise", "shm")
MASTER_WEIGHTS = ("float32", "remainder", "none")


@dataclass(frozen=True)
class Placement:
    """What one rank keeps of every bucket. This is all in which the stages differ."""

    shard_state: bool
    """Optimizer state covers this rank's slice of a bucket rather than the whole bucket."""
    shard_gradient: bool
    """Only this rank's slice of the reduced gradient is kept; the full buffer goes back to a pool after its reduce."""


PLACEMENTS = {
    0: Placement(shard_state=False, shard_gradient=False),
    1: Placement(shard_state=True, shard_gradient=False),
    2: Placement(shard_state=True, shard_gradient=True),
}


@dataclass(frozen=True)
class Config:
    """Checked options; see `zeroopt.wrap` for what each means."""

    stage: int
    bucket_mb: float
    fused: Fused
    transport: str
    overlap: bool
    broadcast_buffers: bool
    sync_module_states: bool
    share_parameters: bool
    reduce_dtype: torch.dtype | None
    bucket_buffers: int
    check_every: int | None
    precision: Precision
    max_grad_norm: float | None
    cast_inputs: bool
    average_every: int | None

    @property
    def placement(self) -> Placement:
        return PLACEMENTS[self.stage]

    @property
    def bucket_bytes(self) -> int:
        return max(1, int(self.bucket_mb * 2**20))

    def check_shares(self, first: Config) -> None:
        """Raise ConfigError when these options of a second optimizer of a model do not go with those of its first."""
        own = {"fused", "precision"}
        if self.precision.param_dtype is None:
            own.add("cast_inputs")  # which could not be given
        for name, value in vars(first).items():
            if name not in own and getattr(self, name) != value:
                raise ConfigError(
                    f"the model was wrapped with {name}={value!r} for its first optimizer, and is now wrapped with "
                    f"{name}={getattr(self, name)!r}; only fused, param_dtype, master_weights and state_dtype may differ"
                )

    def describe(self) -> list[str]:
        """One line for each option on which all ranks have to agree."""
        return [f"option {name}={getattr(self, name)!r}" for name in sorted(vars(self))]


def check_config(
    *,
    stage: int,
    bucket_mb: float,
    fused: Fused,
    transport: str,
    overlap: bool,
    broadcast_buffers: bool,
    sync_module_states: bool,
    share_parameters: bool,
    reduce_dtype: torch.dtype | None,
    bucket_buffers: int,
    check_every: int | None,
    param_dtype: torch.dtype | None,
    master_weights: str,
    state_dtype: torch.dtype,
    max_grad_norm: float | None,
    cast_inputs: bool,
    average_every: int | None,
) -> Config:
    """Return the checked options.

    Raises:
        ConfigError: a value that no release would take.
        NotSupportedError: a value of the fixed API that this release cannot honour yet.
    """
    _check_one_of("stage", stage, tuple(PLACEMENTS))
    _check_one_of("transport", transport, TRANSPORTS)
    _check_one_of("fused", fused, (True, False, "auto"))
    if not isinstance(bucket_mb, (int, float)) or isinstance(bucket_mb, bool) or not 0 < bucket_mb < float("inf"):
        raise ConfigError(f"expected bucket_mb to be a positive number of MiB, got {bucket_mb!r}")
    for name, value in (
        ("overlap", overlap),
        ("broadcast_buffers", broadcast_buffers),
        ("sync_module_states", sync_module_states),
        ("share_parameters", share_parameters),
        ("cast_inputs", cast_inputs),
    ):
        _check_one_of(name, value, (True, False))
    if not isinstance(bucket_buffers, int) or isinstance(bucket_buffers, bool) or bucket_buffers < 1:
        raise ConfigError(f"expected bucket_buffers to be a positive number of buffers, got {bucket_buffers!r}")
    if check_every is not None and (type(check_every) is not int or check_every < 1):
        raise ConfigError(f"expected check_every to be a positive number of steps or None, got {check_every!r}")
    if share_parameters and stage == 0:
        raise ConfigError("share_parameters=True needs stage 1 or 2: in stage 0 every rank steps all parameters")
    _check_reduce_option(reduce_dtype, stage)
    _check_max_grad_norm(max_grad_norm)
    precision = _check_precision(param_dtype, master_weights, state_dtype)
    if cast_inputs and param_dtype is None:
        raise ConfigError("cast_inputs=True casts to param_dtype, which is not given")
    return Config(
        int(stage),
        float(bucket_mb),
        fused,
        transport,
        overlap,
        broadcast_buffers,
        sync_module_states,
        share_parameters,
        reduce_dtype,
        bucket_buffers,
        check_every,
        precision,
        None if max_grad_norm is None else float(max_grad_norm),
        cast_inputs,
        average_every,
    )


def check_param_dtypes(config: Config, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise ConfigError when parameters of these dtypes, by name, cannot be kept in `param_dtype`, or their gradients cannot
    travel in `reduce_dtype`."""
    param_dtype = config.precision.param_dtype
    for name, dtype in dtypes.items():
        if param_dtype is not None and dtype not in (torch.float32, param_dtype):
            raise ConfigError(
                f"param_dtype={param_dtype}: expected parameters of torch.float32 or {param_dtype}, got {name!r} of {dtype}"
            )
        _check_reduce_dtype(config.reduce_dtype, config.precision.stored_dtype(dtype))


def _check_reduce_dtype(reduce_dtype: torch.dtype | None, stored: torch.dtype) -> None:
    widths = {stored.itemsize, (reduce_dtype or stored).itemsize}
    if reduce_dtype not in (None, stored) and widths != {2, 4}:
        raise ConfigError(f"reduce_dtype={reduce_dtype} does not fit parameters of {stored}: leave it at None")


def _check_reduce_option(reduce_dtype: torch.dtype | None, stage: int) -> None:
    _check_one_of("reduce_dtype", reduce_dtype, (None, torch.float32, torch.bfloat16, torch.float16))
    if reduce_dtype is not None and stage == 0:
        raise NotSupportedError("reduce_dtype is supported in stages 1 and 2; leave it at None in stage 0")


def _check_precision(param_dtype: torch.dtype | None, master_weights: str, state_dtype: torch.dtype) -> Precision:
    _check_one_of("param_dtype", param_dtype, (None, torch.bfloat16, torch.float16))
    _check_one_of("master_weights", master_weights, MASTER_WEIGHTS)
    _check_one_of("state_dtype", state_dtype, (torch.float32, torch.bfloat16, torch.int8))
    if master_weights != "float32" and param_dtype is not torch.bfloat16:
        raise ConfigError(
            f"master_weights={master_weights!r} completes or rounds bfloat16 parameters: it needs "
            f"param_dtype=torch.bfloat16, got {param_dtype}"
        )
    return Precision(param_dtype, master_weights, state_dtype)


def _check_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is option or (type(value) is type(option) and value == option) for option in allowed):
        choices = ", ".join(repr(option) for option in allowed)
        raise ConfigError(f"expected {name} to be one of {choices}, got {value!r}")


def _check_max_grad_norm(max_grad_norm: float | None) -> None:
    if max_grad_norm is None:
        return
    if not isinstance(max_grad_norm, (int, float)) or isinstance(max_grad_norm, bool) or not max_grad_norm > 0:
        raise ConfigError(f"expected max_grad_norm to be a positive number or None, got {max_grad_norm!r}")
