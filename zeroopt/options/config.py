"""The options of `zeroopt.wrap`, checked once and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from ..errors import ConfigError, NotSupportedError
from .checks import as_text, check_every_so_many_steps, check_one_of
from .outer import OuterFactory, check_outer
from .placement import PLACEMENTS, Placement
from .precision import Precision
from .splits import Split

if TYPE_CHECKING:
    from ..collectives.select import TransportFactory
    from ..collectives.wire import Wire

Fused = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options that are good by themselves; see `zeroopt.wrap` for what each means.

    Ranks have to agree on all of them, and so have the optimizers of a model. Groups, which each rank knows by other ranks, are
    left out of that (`compare=False`). Names of transports and what serves a group is `collectives.select`'s to check.

    Raises:
        ConfigError: a value that no release would take.
        NotSupportedError: a value of the fixed API that this release cannot honour yet.
    """

    stage: int
    bucket_mb: float | None
    fused: Fused
    transport: str | TransportFactory
    overlap: bool
    broadcast_buffers: bool
    sync_module_states: bool
    share_parameters: bool
    reduce_dtype: torch.dtype | None
    wire: Wire | None
    gradient_compression: str | None
    bucket_buffers: int
    check_every: int | None
    precision: Precision
    max_grad_norm: float | None
    cast_inputs: bool
    average_every: int | None
    outer_optimizer: OuterFactory | None
    outer_fragments: int
    outer_delay: int
    outer_mixing: float | None
    outer_dtype: torch.dtype | str | None
    state_device: torch.device | str | None
    step_in_backward: bool
    micro_batches: int | None
    matrix_splits: Mapping[str, Split] | None
    norm_group: dist.ProcessGroup | None = field(compare=False)
    average_group: dist.ProcessGroup | None = field(compare=False)
    shard_group: dist.ProcessGroup | None = field(compare=False)

    def __post_init__(self) -> None:
        check_one_of("stage", self.stage, tuple(PLACEMENTS))
        check_one_of("fused", self.fused, (True, False, "auto"))
        _check_bucket_mb(self.bucket_mb)
        for name in (
            *("overlap", "broadcast_buffers", "sync_module_states", "share_parameters", "cast_inputs"),
            "step_in_backward",
        ):
            check_one_of(name, getattr(self, name), (True, False))
        _check_bucket_buffers(self.bucket_buffers)
        check_every_so_many_steps("check_every", self.check_every)
        check_every_so_many_steps("average_every", self.average_every)
        _check_reduce_dtype("reduce_dtype", self.reduce_dtype, self.stage)
        if self.wire is not None:
            if self.reduce_dtype is not None:
                raise ConfigError("expected reduce_dtype or wire, got both: a wire has a dtype of its own")
            if self.stage == 0:
                raise NotSupportedError("wire is supported in stages 1 and 2; leave it at None in stage 0")
            _check_reduce_dtype("wire.dtype", self.wire.dtype, self.stage)
        self._check_gradient_compression()
        _check_max_grad_norm(self.max_grad_norm)
        _check_state_device(self.state_device)
        if self.share_parameters and self.stage == 0:
            raise ConfigError("share_parameters=True needs stage 1 or 2: in stage 0 every rank steps all parameters")
        if self.step_in_backward:
            self._check_step_in_backward()
        if self.precision.parameter_compression is not None:
            self._check_parameter_compression()
        if self.micro_batches is not None:
            self._check_micro_batches()
        if self.cast_inputs and self.precision.param_dtype is None:
            raise ConfigError("cast_inputs=True casts to param_dtype, which is not given")
        if self.shard_group is not None:
            self._check_shard_group()
        if self.average_group is not None and self.average_every is None:
            raise ConfigError("average_group needs average_every, the number of steps between two averages")
        check_outer(self)
        # 25 and 25.0 are the same option, and read alike wherever ranks compare them.
        if self.bucket_mb is not None:
            object.__setattr__(self, "bucket_mb", float(self.bucket_mb))
        if self.max_grad_norm is not None:
            object.__setattr__(self, "max_grad_norm", float(self.max_grad_norm))
        if self.state_device is not None:
            object.__setattr__(self, "state_device", torch.device(self.state_device))

    def _check_gradient_compression(self) -> None:
        check_one_of("gradient_compression", self.gradient_compression, (None, "int8", "int4"))
        if self.gradient_compression is None:
            return
        if self.wire is not None:
            raise ConfigError(
                "expected gradient_compression or wire, got both: either is a form in which gradients travel"
            )
        if self.stage == 0:
            raise NotSupportedError(
                "gradient_compression is supported in stages 1 and 2, where what codes leave out is kept beside slices; leave it "
                "at None in stage 0"
            )

    def _check_shard_group(self) -> None:
        if not isinstance(self.shard_group, dist.ProcessGroup):
            raise ConfigError(
                f"expected shard_group to be a torch.distributed.ProcessGroup that this rank is in, got {self.shard_group!r}"
            )
        if self.stage == 0:
            raise ConfigError("shard_group needs stage 1 or 2: in stage 0 nothing is sharded")
        if self.shard_group.size() == 1:
            raise ConfigError(
                "shard_group has one rank, which would hold everything: stage=0 does that without a shard_group"
            )
        if self.share_parameters:
            raise NotSupportedError("share_parameters=True is not supported with shard_group; leave one of them out")
        if self.average_every is not None:
            raise NotSupportedError("average_every is not supported with shard_group; leave one of them out")
        compressions = {
            "gradient_compression": self.gradient_compression,
            "parameter_compression": self.precision.parameter_compression,
        }
        for name, compression in compressions.items():
            if compression is not None:
                raise NotSupportedError(f"{name} is not supported with shard_group; leave one of them out")
        if self.wire is not None and not self.wire.nests:
            raise NotSupportedError(
                f"wire={as_text(self.wire)} cannot go through shard_group, across which sums of a group travel on: it does not nest"
            )

    def _check_step_in_backward(self) -> None:
        if self.stage != 2:
            raise ConfigError(
                f"step_in_backward=True needs stage 2, got stage={self.stage}: in stages 0 and 1 gradients have memory of their "
                "own for good, which it could not save"
            )
        for name in ("max_grad_norm", "check_every", "average_every"):
            if getattr(self, name) is not None:
                self.check_keeps_gradients(f"{name}={getattr(self, name)}")
        if self.precision.param_dtype is torch.float16:
            self.check_keeps_gradients(
                "param_dtype=torch.float16, which calls for a GradScaler (torch.bfloat16 does not),"
            )

    def _check_micro_batches(self) -> None:
        count = self.micro_batches
        if not isinstance(count, int) or isinstance(count, bool) or count < 1 or count & (count - 1):
            raise ConfigError(f"expected micro_batches to be 1, 2, 4 or another power of two, or None, got {count!r}")
        refused = {
            "step_in_backward": self.step_in_backward,
            "average_every": self.average_every,
            "gradient_compression": self.gradient_compression,
            "parameter_compression": self.precision.parameter_compression,
            "wire": self.wire,
        }
        for name, value in refused.items():
            if value:
                raise NotSupportedError(
                    f"micro_batches promises the same bits on any number of ranks, and {name}={as_text(value)} does not give them; "
                    "leave one of them out"
                )
        if self.reduce_dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"micro_batches sums in float32, and reduce_dtype={self.reduce_dtype} would round what a rank has summed: leave it at "
                "None, or with 16-bit parameters at torch.float32"
            )

    def _check_parameter_compression(self) -> None:
        name = f"parameter_compression={self.precision.parameter_compression!r}"
        if self.stage == 0:
            raise ConfigError(f"{name} needs stage 1 or 2: in stage 0 every rank steps all parameters, and none travel")
        if self.share_parameters:
            raise NotSupportedError(f"{name} gives every rank parameters of its own; leave share_parameters at False")
        if self.average_every is not None:
            raise NotSupportedError(
                f"{name} sends differences from step to step, which averages are not; leave average_every out"
            )
        if self.state_device is not None:
            raise NotSupportedError(f"{name} keeps exact values where the parameters are; leave state_device out")

    def check_keeps_gradients(self, what: str) -> None:
        """Raise NotSupportedError when something needs the gradients of a whole step, and none are kept."""
        if self.step_in_backward:
            raise NotSupportedError(
                f"{what} needs the gradients of a whole step together, and step_in_backward=True keeps none: each bucket is "
                "stepped as soon as its sum is there. Wrap with step_in_backward=False for it"
            )

    @property
    def placement(self) -> Placement:
        placement = PLACEMENTS[self.stage]
        return placement if self.state_device is None else replace(placement, home=torch.device(self.state_device))

    def check_shares(self, first: Config) -> None:
        """Raise ConfigError when these options of a second optimizer of a model do not go with those of its first."""
        own = {"fused", "precision", "matrix_splits"}
        if self.precision.param_dtype is None:
            own.add("cast_inputs")  # which could not be given
        for name in self._compared():
            if name not in own and as_text(getattr(self, name)) != as_text(getattr(first, name)):
                raise ConfigError(
                    f"the model was wrapped with {name}={getattr(first, name)!r} for its first optimizer, and is now wrapped "
                    f"with {name}={getattr(self, name)!r}; only fused, param_dtype, master_weights, state_dtype, "
                    "parameter_compression and matrix_splits may differ"
                )

    @property
    def wire_dtype(self) -> torch.dtype | None:
        """Of the buffers in which gradients travel; None: that of the parameters."""
        return self.reduce_dtype if self.wire is None else self.wire.dtype

    def describe(self) -> list[str]:
        """One line for each option on which all ranks have to agree."""
        lines = [f"option {name}={as_text(getattr(self, name))}" for name in sorted(self._compared())]
        shards = "" if self.shard_group is None else f"a group of {self.shard_group.size()} ranks"
        return [
            *lines,
            f"option shard_group is {shards or None}",
            f"option norm_group is {'' if self.norm_group is None else 'not '}None",
        ]

    def _compared(self) -> list[str]:
        return [option.name for option in fields(self) if option.compare]


def check_param_dtypes(config: Config, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise ConfigError when parameters of these dtypes, by name, cannot be kept in `param_dtype`, or their gradients cannot
    travel in the dtype that was asked for."""
    param_dtype = config.precision.param_dtype
    for param, dtype in dtypes.items():
        if config.precision.parameter_compression is not None and dtype is not torch.float32:
            raise ConfigError(
                f"parameter_compression={config.precision.parameter_compression!r}: expected parameters of torch.float32, got "
                f"{param!r} of {dtype}"
            )
        if param_dtype is not None and dtype not in (torch.float32, param_dtype):
            raise ConfigError(
                f"param_dtype={param_dtype}: expected parameters of torch.float32 or {param_dtype}, got {param!r} of {dtype}"
            )
        stored = config.precision.stored_dtype(dtype)
        if config.micro_batches is not None and (config.wire_dtype or stored).itemsize == 2:
            raise ConfigError(
                f"micro_batches sums in float32, and the gradient of {param!r} would travel in {stored}, in which what a rank has summed "
                "would be rounded: pass reduce_dtype=torch.float32 (stages 1 and 2)"
            )
        name = "reduce_dtype" if config.wire is None else "wire.dtype"
        _check_fits(name, config.wire_dtype, config.precision.stored_dtype(dtype))


def _check_fits(name: str, reduce_dtype: torch.dtype | None, stored: torch.dtype) -> None:
    widths = {stored.itemsize, (reduce_dtype or stored).itemsize}
    if reduce_dtype not in (None, stored) and widths != {2, 4}:
        raise ConfigError(f"{name}={reduce_dtype} does not fit parameters of {stored}: leave it at None")


def _check_bucket_mb(bucket_mb: float | None) -> None:
    if bucket_mb is None:
        return
    if not isinstance(bucket_mb, (int, float)) or isinstance(bucket_mb, bool) or not 0 < bucket_mb < float("inf"):
        raise ConfigError(f"expected bucket_mb to be a positive number of MiB, or None, got {bucket_mb!r}")


def _check_bucket_buffers(bucket_buffers: int) -> None:
    if not isinstance(bucket_buffers, int) or isinstance(bucket_buffers, bool) or bucket_buffers < 1:
        raise ConfigError(f"expected bucket_buffers to be a positive number of buffers, got {bucket_buffers!r}")


def _check_reduce_dtype(name: str, reduce_dtype: torch.dtype | None, stage: int) -> None:
    check_one_of(name, reduce_dtype, (None, torch.float32, torch.bfloat16, torch.float16))
    if reduce_dtype is not None and stage == 0:
        raise NotSupportedError("reduce_dtype is supported in stages 1 and 2; leave it at None in stage 0")


def _check_state_device(state_device: torch.device | str | None) -> None:
    try:
        is_cpu = state_device is None or torch.device(state_device).type == "cpu"
    except (RuntimeError, TypeError):
        is_cpu = False
    if not is_cpu:
        raise ConfigError(
            f"expected state_device to be 'cpu', or None for the device of the parameters, got {state_device!r}"
        )


def _check_max_grad_norm(max_grad_norm: float | None) -> None:
    if max_grad_norm is None:
        return
    if not isinstance(max_grad_norm, (int, float)) or isinstance(max_grad_norm, bool) or not max_grad_norm > 0:
        raise ConfigError(f"expected max_grad_norm to be a positive number or None, got {max_grad_norm!r}")
