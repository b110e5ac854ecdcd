"""What a rank holds of a wrapped model, counted from its buckets, and what the log says of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import ops
from ..collectives import ControlGroup, Transport
from ..features.outer.memory import outer_bytes
from ..options.config import Config
from ..probing.state_size import StateSize
from ..stepping.rules import rule_for
from ..storage.bucket import Bucket
from ..storage.buffer_pool import bytes_of_buffer, num_buffers
from ..storage.gradient_store import GradientStore

_log = logging.getLogger("zeroopt")


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank between a forward and a step, buffers for messages and activations aside.

    Attributes:
        parameters: all of them, or this rank's part where the ranks of a host share one copy.
        masters: float32 masters or remainders of this rank's slices.
        gradients: sums, and in stages 0 and 1 the full buckets in which they lie; of one bucket where backward steps.
        buffers: full buckets of gradients that stage 2 lends.
        moments: the optimizer's arrays.
        outer: what outer steps keep: anchors, the outer optimizer's arrays, and buckets that are on the way between groups.
        residuals: what `gradient_compression` has left out of gradients.
    """

    parameters: int
    masters: int
    gradients: int
    buffers: int
    moments: int
    outer: int = 0
    residuals: int = 0

    @property
    def total(self) -> int:
        held = self.parameters + self.masters + self.gradients + self.buffers + self.moments
        return held + self.outer + self.residuals


def footprint(
    buckets: Sequence[Bucket],
    stores: Sequence[GradientStore],
    optimizer: torch.optim.Optimizer,
    config: Config,
    transport: Transport,
    bucket_bytes: int,
    num_groups: int = 1,
) -> Footprint:
    """Count before the first step what a rank will hold. Not collective.

    Args:
        num_groups: of ranks that train alone, and average.
    """
    sharing = transport.num_slices // len(transport.writers) if config.share_parameters else 1
    borrowers = [bucket for bucket, store in zip(buckets, stores, strict=True) if store.borrows]
    return Footprint(
        parameters=sum(bucket.flat_param.nbytes for bucket in buckets) // sharing,
        masters=sum(bucket.master.nbytes for bucket in buckets),
        gradients=(max if config.step_in_backward else sum)(map(_gradient_bytes, stores)),
        buffers=num_buffers(config) * bytes_of_buffer(config, bucket_bytes, borrowers, transport.num_slices),
        moments=_moment_bytes(buckets, stores, optimizer, config),
        outer=outer_bytes(buckets, config, num_groups),
        residuals=sum(store.residual.nbytes for store in stores if store.residual is not None),
    )


def _gradient_bytes(store: GradientStore) -> int:
    if store.full is None:
        return store.reduced.nbytes
    # By the storages themselves: on the meta device, none has an address.
    apart = store.reduced.untyped_storage()._cdata != store.full.untyped_storage()._cdata
    return store.full.nbytes + (store.reduced.nbytes if apart else 0)


def _moment_bytes(
    buckets: Sequence[Bucket], stores: Sequence[GradientStore], optimizer: torch.optim.Optimizer, config: Config
) -> int:
    rule = rule_for(optimizer)
    groups = optimizer.param_groups
    names = [() if rule is None else rule.names_in_use(group) for group in groups]
    home = next((bucket.home for bucket in buckets if bucket.home.type != "meta"), torch.device("cpu"))
    sizes = [StateSize(optimizer, number, home) for number in range(len(groups))]
    total = 0
    for bucket, store in zip(buckets, stores, strict=True):
        if (
            rule is not None
            and config.fused
            and config.precision.storage(bucket.dtype, store.reduced.dtype) is not None
        ):
            used = {name for segment in bucket.segments for name in names[segment.owner.group]}
            total += len(used) * _array_bytes(bucket.own_param.numel(), config.precision.state_dtype)
            continue
        for segment in bucket.segments:
            group, shard = segment.owner.group, segment.shard
            if rule is not None:
                total += len(names[group]) * _array_bytes(segment.numel, segment.state_dtype)
            elif segment.owner.is_whole:
                total += sizes[group].of_tensor(shard.shape, shard.dtype)
            else:
                total += sizes[group].of_elements(segment.numel, shard.dtype)
    return total


def _array_bytes(numel: int, dtype: torch.dtype) -> int:
    """Of an array of state, with its scales."""
    scales = 4 * ops.num_blocks(numel) if dtype is torch.int8 else 0
    return numel * dtype.itemsize + scales


def log_wrapped(
    buckets: Sequence[Bucket],
    stores: Sequence[GradientStore],
    optimizer: torch.optim.Optimizer,
    config: Config,
    transport: Transport,
    bucket_bytes: int,
    control: ControlGroup,
    num_groups: int = 1,
) -> None:
    """Say on rank 0 what has been made of a model: one line, and with level DEBUG one for each bucket."""
    if control.rank != 0 or not _log.isEnabledFor(logging.INFO):
        return
    held = footprint(buckets, stores, optimizer, config, transport, bucket_bytes, num_groups)
    num_params = sum(len(bucket.params) for bucket in buckets)
    numel = sum(managed.numel for bucket in buckets for managed in bucket.params)
    _log.info(
        "stage %d over %d ranks, transport %s: %d parameters (%d elements) in %d buckets. A rank will hold %s MB: parameters "
        "%s MB, masters %s MB, gradients %s MB in sums and %s MB in buffers, optimizer state %s MB%s",
        config.stage,
        transport.control.size,
        transport.name,
        num_params,
        numel,
        len(buckets),
        _in_mb(held.total),
        *map(_in_mb, (held.parameters, held.masters, held.gradients, held.buffers, held.moments)),
        (f", outer steps {_in_mb(held.outer)} MB" if held.outer else "")
        + (f", residuals {_in_mb(held.residuals)} MB" if held.residuals else ""),
    )
    for bucket in buckets:
        begin, end = bucket.own_range
        _log.debug(
            "%s: %d parameter%s, %d elements of %s, of which rank 0 steps %d",
            bucket.name,
            len(bucket.params),
            "" if len(bucket.params) == 1 else "s",
            bucket.padded_numel,
            bucket.dtype,
            end - begin,
        )


def _in_mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f}"
