"""One rank's slice of buckets in one process, without other ranks: for tests of what lies where in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zeroopt.collectives import PendingCollective, Wire
from zeroopt.collectives.lone import lone_group
from zeroopt.collectives.pending import Done
from zeroopt.collectives.single import SingleTransport
from zeroopt.collectives.wire import PLAIN
from zeroopt.options.config import Config
from zeroopt.options.precision import Precision
from zeroopt.plan.buckets import make_plan
from zeroopt.plan.ownership import Ownership
from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.storage.bucket import Bucket, fill_buckets, lay_out_buckets
from zeroopt.storage.gradient_store import GradientStore
from zeroopt.storage.own_shard import OwnShard
from zeroopt.storage.segment import Segment


class LoneSlice(SingleTransport):
    """As if there were other ranks, whose gradients are zero, and from which nothing comes.

    Attributes:
        allocated: sizes in bytes of the buffers that have been asked for.
        freed: addresses of those that have been given up.
    """

    def __init__(self, num_slices: int = 1, slice_index: int = 0) -> None:
        super().__init__(lone_group())
        self.num_slices, self.slice_index = num_slices, slice_index
        self.allocated: list[int] = []
        self.freed: list[int] = []

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> Tensor:
        self.allocated.append(numel * dtype.itemsize)
        return super().allocate(numel, dtype, device, shared=shared)

    def free(self, buffer: Tensor) -> None:
        self.freed.append(buffer.data_ptr())

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        wire.combine([self.own_slice(full)], out, base)
        return Done()


def config_with(**options: Any) -> Config:
    """The options of `zeroopt.wrap` as they are when nothing is given, but for these."""
    given: dict[str, Any] = {
        "stage": 2,
        "bucket_mb": 25.0,
        "fused": "auto",
        "transport": "auto",
        "overlap": True,
        "broadcast_buffers": True,
        "sync_module_states": True,
        "share_parameters": False,
        "reduce_dtype": None,
        "wire": None,
        "gradient_compression": None,
        "bucket_buffers": 2,
        "check_every": None,
        "precision": Precision(),
        "max_grad_norm": None,
        "cast_inputs": False,
        "average_every": None,
        "outer_optimizer": None,
        "outer_fragments": 1,
        "outer_delay": 0,
        "outer_mixing": None,
        "outer_dtype": None,
        "state_device": None,
        "step_in_backward": False,
        "micro_batches": None,
        "matrix_splits": None,
        "norm_group": None,
        "average_group": None,
        "shard_group": None,
    }
    return Config(**{**given, **options})


def values(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def params_of(*tensors: Tensor, grain: Grain = Grain.ELEMENT, group: int = 0) -> list[ManagedParam]:
    """Parameters p0, p1, … with copies of these values."""
    return [ManagedParam(f"p{i}", nn.Parameter(t.clone()), i, group, i, grain) for i, t in enumerate(tensors)]


def buckets_of(
    params: Sequence[ManagedParam],
    transport: LoneSlice,
    *,
    by_slices: bool = True,
    precision: Precision | None = None,
    bucket_bytes: int = 1 << 20,
    shared: bool = False,
    first_index: int = 0,
) -> list[Bucket]:
    """Buckets with these parameters, from the last one to the first."""
    ownership = Ownership(transport.num_slices, transport.slice_index, by_slices=by_slices)
    precision = Precision() if precision is None else precision
    plan = make_plan(params, ownership, bucket_bytes, precision)
    buckets = lay_out_buckets(plan, params, ownership, precision, home=None, first_index=first_index)
    fill_buckets(buckets, transport, shared=shared)
    return buckets


class LoneStep:
    """What an optimizer steps on one rank of several: parameters in buckets, with sums of gradients, and the same without zeroopt.

    Attributes:
        optimizer, twin: of the same class and options; every second parameter is in a second group.
        shards: what the stepper works on.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        make: Callable[[Any], torch.optim.Optimizer],
        transport: LoneSlice | None = None,
        *,
        grain: Grain = Grain.ELEMENT,
        precision: Precision | None = None,
        bucket_bytes: int = 1 << 20,
    ) -> None:
        transport = LoneSlice() if transport is None else transport
        self.params = params_of(*tensors, grain=grain)
        self.twins = [nn.Parameter(tensor.clone()) for tensor in tensors]
        for number, managed in enumerate(self.params):
            managed.group = number % 2
        self.optimizer, self.twin = (
            make([{"params": found[0::2]}, {"params": found[1::2], "lr": 0.25}])
            for found in ([managed.param for managed in self.params], self.twins)
        )
        self.transport = transport
        self.buckets = buckets_of(self.params, transport, precision=precision, bucket_bytes=bucket_bytes)
        ownership = Ownership(transport.num_slices, transport.slice_index, by_slices=True)
        self.stores = [GradientStore(bucket, ownership, Wire(), transport, None) for bucket in self.buckets]
        self.shards = [OwnShard(bucket, store) for bucket, store in zip(self.buckets, self.stores, strict=True)]

    def backward(self, seed: int, unused: Collection[int] = ()) -> Tensor:
        """Let all parameters but some have gradients, here and there. Returns 1 for those that have, as steppers want it."""
        for store in self.stores:
            store.discard()
        full = {bucket: store.open() for bucket, store in zip(self.buckets, self.stores, strict=True)}
        for bucket in self.buckets:
            for managed in bucket.params:
                grad = values(managed.shape, 1000 * seed + managed.index, bucket.dtype)
                managed.view_in(full[bucket]).copy_(grad)
                twin = self.twins[managed.index]
                twin.grad = None if managed.index in unused else grad.to(twin.dtype)
        for store in self.stores:
            store.start_reduce(self.transport)
            store.finish()
        return torch.tensor([managed.index not in unused for managed in self.params], dtype=torch.uint8)

    def segments(self) -> list[Segment]:
        """What this rank steps."""
        return [segment for bucket in self.buckets for segment in bucket.segments]

    def assert_follows(self, before: Sequence[Tensor], rtol: float = 1e-5) -> None:
        """What this rank steps is as the twin has it, up to rounding, and the rest as it was."""
        masters = {segment: bucket.master for bucket in self.buckets for segment in bucket.segments}
        mine = {segment.owner: segment for segment in masters}
        for managed, twin, old in zip(self.params, self.twins, before, strict=True):
            expected = managed.flatten(old).clone()
            if managed in mine:
                segment = mine[managed]
                begin, end = segment.start, segment.start + segment.numel
                expected[begin:end] = managed.flatten(twin.detach())[begin:end]
                exact = masters[segment].exact(*segment.range)
                torch.testing.assert_close(exact, expected[begin:end].to(exact.dtype), rtol=rtol, atol=1e-6)
                rounded = managed.flatten(managed.local)[begin:end]
                assert torch.equal(rounded, masters[segment].round(exact).to(rounded.dtype))
            if managed.param.dtype is old.dtype:
                torch.testing.assert_close(managed.flatten(managed.local), expected, rtol=rtol, atol=1e-6)
