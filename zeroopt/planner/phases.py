"""What one rank holds in each phase of a training, by what it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .. import ops
from ..diagnosis.footprint import footprint
from ..features.outer.memory import outer_bytes_saved
from ..options.config import Config
from ..options.precision import CODE_BITS
from ..parameters.differences import encoded_bytes
from ..plan.params import Grain
from ..storage.bucket import Bucket
from ..storage.buffer_pool import num_buffers
from .activations import Activations
from .own_step import own_step_bytes
from .rehearsal import Cluster, Rehearsal, Trainee
from .runtime import runtime_bytes
from .waiting_gradients import waiting_gradients

PARTS = (
    "parameters",
    "masters",
    "gradients",
    "unsent",
    "residuals",
    "state",
    "outer",
    "buffers",
    "staging",
    "codes",
    "copies",
    "activations",
    "scratch",
    "rest",
    "runtime",
)
"""What bytes are for. unsent: with `micro_batches`, whole gradients that a rank sums before they travel. residuals: what
`gradient_compression` has left out of gradients. buffers: full gradient buffers of stage 2. outer: what outer steps keep. staging:
what messages take beside buffers. codes: in which differences of parameters travel. copies: those of `zeroopt.elastic.Guard`, on the
CPU. rest: frozen parameters and the model's buffers. scratch: for a while, such as a bucket that is moved. runtime: see
`runtime.py`."""

_BEFORE_TRAINING = ("building", "wrapping")  # in which libraries take nothing worth counting


@dataclass(frozen=True)
class Phase:
    """What is held when a phase holds most.

    Attributes:
        parts: bytes by what they are for, in the order of `PARTS`; what there is none of is left out.
    """

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Setting:
    """What is the same for all options that are looked at.

    Attributes:
        trainees: in the model's order.
        built: bytes of all parameters of the model as it is built.
        frozen: bytes of parameters that the optimizer does not train, as they are built.
        model_buffers: bytes.
        module: bytes of the parameters of the largest module, where `wrap` builds the model module by module; None where it is
            built before.
        copies: whether a `zeroopt.elastic.Guard` copies what each rank steps.
    """

    optimizer: torch.optim.Optimizer
    trainees: Sequence[Trainee]
    cluster: Cluster
    built: int
    frozen: int
    model_buffers: int
    module: int | None = None
    copies: bool = False


def phases_of(
    setting: Setting, rehearsal: Rehearsal, guessed: Rehearsal, config: Config, activations: Activations | None
) -> list[Phase]:
    """The phases of a training with these options, in the order in which they come.

    Args:
        rehearsal: with buckets in the order of gradients, once that is known.
        guessed: with buckets as they are before.
    """
    return list(_Course(setting, rehearsal, guessed, config, activations).phases())


class _Course:
    """A training from the building of the model to a load."""

    def __init__(
        self,
        setting: Setting,
        rehearsal: Rehearsal,
        guessed: Rehearsal,
        config: Config,
        activations: Activations | None,
    ) -> None:
        self.setting, self.rehearsal, self.guessed = setting, rehearsal, guessed
        self.config, self.activations = config, activations
        held = footprint(
            rehearsal.buckets,
            rehearsal.stores,
            setting.optimizer,
            config,
            rehearsal.transport,
            rehearsal.bucket_bytes,
            setting.cluster.num_groups,
        )
        self.held = held
        self.is_lazy = setting.cluster.device == "cpu"  # pages take memory when they are first used
        self.full_gradients = sum(store.full.nbytes for store in rehearsal.stores if store.full is not None)
        self.sums = held.gradients - self.full_gradients
        cast = config.precision.param_dtype is not None
        self.rest = (setting.frozen // 2 if cast else setting.frozen) + setting.model_buffers
        self.buffers = self._touched_buffers() if self.is_lazy else held.buffers
        self.staging = self._staging()
        # On a device it goes back to the allocator when a reduce is through.
        self.kept_staging = self.staging if self.rehearsal.transport.needs_staging else 0
        brought = self._slice_sums()
        self.staging += brought
        self.kept_staging += brought if self.is_lazy else 0

    def phases(self) -> Iterator[Phase]:
        held = self.held
        kept = {"parameters": held.parameters, "masters": held.masters, "gradients": held.gradients}
        kept["residuals"] = held.residuals
        state = {"state": held.moments, "outer": held.outer, "codes": self._codes(), "copies": self._copies()}
        in_backward = {"buffers": self.buffers, "staging": self.staging, "unsent": self._unsent()}
        on_the_way = {"buffers": self.buffers, "staging": self.kept_staging}
        own_step = own_step_bytes(self.rehearsal, self.setting.optimizer, self.config, self.setting.cluster.device)
        if self.setting.module is None:
            yield self._phase("building", {"parameters": self.setting.built - self.setting.frozen, "rest": self.rest})
        yield self._wrapping()
        yield self._first_backward()
        if self.activations is None or self._moves():
            yield self._moving()
        yield self._phase("first step", {**kept, **state, **on_the_way})
        yield self._phase(
            "forward and backward",
            {**kept, **state, **in_backward, "activations": self._most_in_backward(self.rehearsal)},
        )
        yield self._phase("step", {**kept, **state, **on_the_way, "scratch": own_step})
        yield self._phase(
            "saving", {**kept, **state, **on_the_way, "scratch": self._largest_piece() + self._outer_whole()}
        )
        yield self._phase("saving in the background", {**kept, **state, **on_the_way, "scratch": self._written()})
        yield self._phase("loading", {**kept, **state, **on_the_way, "scratch": self._read()})

    def _phase(self, name: str, parts: dict[str, int]) -> Phase:
        parts = {"rest": self.rest, **parts}
        if name not in _BEFORE_TRAINING:
            parts["runtime"] = runtime_bytes(self.setting.cluster.device, self.setting.built)
        return Phase(name, {part: parts[part] for part in PARTS if parts.get(part)})

    def _wrapping(self) -> Phase:
        """Parameters leave their memory bucket by bucket, or are made in buckets module by module."""
        size = {trainee.name: trainee.nbytes for trainee in self.setting.trainees}
        old, new, masters = sum(size.values()), 0, 0
        most = old, 0
        for bucket in self.guessed.buckets:
            new += bucket.flat_param.nbytes // self._sharing
            masters += bucket.master.nbytes
            most = max(most, (old + new, masters), key=sum)
            old -= sum(size[managed.name] for managed in bucket.params)
        kept = {"parameters": self.held.parameters, "masters": self.held.masters}
        parts = {"parameters": most[0], "masters": most[1]}
        if self.setting.module is not None:
            parts = {**kept, "scratch": self._module_apart(self.setting.module)}
        gradients = {} if self.is_lazy else {"gradients": self.held.gradients, "buffers": self.held.buffers}
        return self._phase("wrapping", max(parts, {**kept, **gradients}, key=_sum_of))

    def _module_apart(self, module: int) -> int:
        """Bytes of what is not made where it will lie: what is rounded on its way there (of the rank whose values others take over: their
        own are folded), or is there already by another rank of the host."""
        dtypes = {trainee.name: trainee.dtype for trainee in self.setting.trainees}
        is_rounded = any(
            bucket.master.completes or any(bucket.dtype is not dtypes[managed.name] for managed in bucket.params)
            for bucket in self.guessed.buckets
        )
        makes_for_nobody = self.config.share_parameters and not self.config.sync_module_states
        return module if is_rounded or makes_for_nobody else 0

    def _first_backward(self) -> Phase:
        """State does not exist yet, unless backward steps; but where the order of gradients is not known, some wait for their bucket."""
        held = self.held
        parts = {"parameters": held.parameters, "masters": held.masters, "gradients": held.gradients}
        parts |= {"buffers": self.buffers, "staging": self.staging, "residuals": held.residuals}
        parts["unsent"] = self._unsent()
        if self.config.step_in_backward:
            parts["state"] = held.moments
        if self.activations is None:
            return self._phase("first backward", parts)
        planned = self.rehearsal if self._is_foreseen else self.guessed
        # Buckets take memory as gradients come, but of the activations that go meanwhile the C heap keeps most.
        return self._phase("first backward", {**parts, "activations": self._most_in_backward(planned)})

    def _most_in_backward(self, rehearsal: Rehearsal) -> int:
        """Activations, and gradients that lie beside the buckets of a rehearsal."""
        if self.activations is None:
            return 0
        buffers, on_device = num_buffers(self.config), not self.is_lazy
        waiting = waiting_gradients(rehearsal, self.activations, buffers, packs_together=on_device)
        return max(peak + waits for peak, waits in zip(self.activations.peaks, waiting, strict=True))

    @property
    def _is_foreseen(self) -> bool:
        """Whether the first backward goes by the order of gradients already, and their sums stay where they are when parameters move."""
        config = self.config
        are_cut = all(trainee.grain is Grain.ELEMENT for trainee in self.setting.trainees)
        waits_for_others = self.setting.cluster.world_size > 1 and config.average_every is None and config.overlap
        return config.placement.shard_gradient and not config.step_in_backward and are_cut and waits_for_others

    @property
    def _sharing(self) -> int:
        return self.setting.cluster.host_ranks if self.config.share_parameters else 1

    def _touched_buffers(self) -> int:
        """A buffer takes memory as far as it was ever filled, and which one is filled next is the one that was last given back."""
        count = num_buffers(self.config)
        most = self.held.buffers // count
        sizes = [bucket.padded_numel * self._travels_in(bucket).itemsize for bucket in self.rehearsal.buckets]
        sizes.sort(reverse=True)
        return min(self.held.buffers, count * most if sizes[0] > most else sum(sizes[:count]))

    def _staging(self) -> int:
        transport = self.rehearsal.transport
        on_their_way = 1  # or one after the other takes it
        if transport.needs_staging and self.config.overlap:
            on_their_way = max(1, self.config.bucket_buffers - 1)
        sizes = []
        for bucket, store in zip(self.rehearsal.buckets, self.rehearsal.stores, strict=True):
            dtype = self._travels_in(bucket)
            num_bytes = bucket.padded_numel * dtype.itemsize
            if self.held.buffers:
                num_bytes = min(num_bytes, self.held.buffers // num_buffers(self.config))
            sizes.append(self._staging_of(num_bytes, dtype.itemsize, is_encoded=store.residual is not None))
        return sum(sorted(sizes, reverse=True)[:on_their_way])

    def _slice_sums(self) -> int:
        """Of sums on their way from slices to those who step them, and of what comes before it is rounded."""
        at_once = (
            max(1, self.config.bucket_buffers - 1) if self.config.overlap and not self.config.step_in_backward else 1
        )
        sizes = []
        for bucket, store in zip(self.rehearsal.buckets, self.rehearsal.stores, strict=True):
            if bucket.moves is not None:
                wide = torch.float64 if bucket.dtype is torch.float64 else torch.float32
                own = 0 if store.reduced.dtype is wide else bucket.own_param.numel()
                sizes.append((bucket.padded_numel // self.rehearsal.transport.num_slices + own) * wide.itemsize)
        return sum(sorted(sizes, reverse=True)[:at_once])

    def _staging_of(self, num_bytes: int, item_bytes: int, *, is_encoded: bool) -> int:
        """Beside a full buffer of so many bytes while it travels. Codes have memory of their own, and as much is received."""
        transport, compression = self.rehearsal.transport, self.config.gradient_compression
        if not is_encoded or compression is None:
            return transport.staging_of(num_bytes, item_bytes)
        slice_numel = num_bytes // item_bytes // transport.num_slices
        num_sent = len(transport.sent_slices)
        summed = num_sent * slice_numel * item_bytes if transport.sums_twice else 0  # of a host
        return summed + 2 * num_sent * ops.encoded_bytes(slice_numel, CODE_BITS[compression])

    def _unsent(self) -> int:
        """Sums of micro-batches, at most one for each level of their tree on a rank. The lowest one is in `param.grad`."""
        levels = (self.config.micro_batches or 1).bit_length() - 1
        return levels * sum(
            managed.numel * max(torch.float32.itemsize, bucket.dtype.itemsize)
            for bucket in self.rehearsal.buckets
            for managed in bucket.params
        )

    def _codes(self) -> int:
        """Of parameters whose differences travel."""
        num_slices = self.rehearsal.transport.num_slices
        compressed = [bucket for bucket in self.rehearsal.buckets if bucket.precision.parameter_compression is not None]
        return sum(encoded_bytes(bucket, num_slices) for bucket in compressed)

    def _travels_in(self, bucket: Bucket) -> torch.dtype:
        return self.config.wire_dtype or bucket.dtype

    def _moves(self) -> bool:
        """Whether parameters change buckets when the order of gradients is known."""
        before, after = ([{m.name for m in b.params} for b in r.buckets] for r in (self.guessed, self.rehearsal))
        return before != after

    def _moving(self) -> Phase:
        """What lies by slices moves first, while gradients have their buffers; parameters move when these are gone."""
        held, config = self.held, self.config
        kept = {"parameters": held.parameters, "masters": held.masters, "residuals": held.residuals}
        if not self._is_foreseen:
            kept["residuals"] *= 2  # in the order of the buckets before, and of those behind
        if config.step_in_backward:
            kept["state"] = held.moments
        slices = {**kept, "gradients": held.gradients, "buffers": self.buffers, "staging": self.kept_staging}
        slices["scratch"] = self._slices_twice()
        sums = held.gradients if self._is_foreseen or config.step_in_backward else self._own_sums
        masters = 0 if self.is_lazy else held.masters  # their new memory is there before they are
        parameters = {**kept, "gradients": sums, "scratch": self._parameters_twice() + masters}
        return self._phase("moving", max(slices, parameters, key=_sum_of))

    @property
    def _own_sums(self) -> int:
        return sum(store.reduced.nbytes for store in self.rehearsal.stores)

    def _slices_twice(self) -> int:
        """A buffer in which a bucket's slices are put together, and what of them is there twice: those of one bucket, or of all where
        their old memory does not go bucket by bucket."""
        buckets, stores, config = self.guessed.buckets, self.guessed.stores, self.config
        moved = {"masters": [bucket.master.nbytes for bucket in buckets]}
        if config.step_in_backward:
            numel = sum(bucket.own_param.numel() for bucket in buckets)
            moved["state"] = [self.held.moments * bucket.own_param.numel() // numel for bucket in buckets]
        elif not self._is_foreseen:
            moved["sums"] = [store.reduced.nbytes for store in stores]
        if not any(map(sum, moved.values())):
            return 0
        goes = {"masters": self.is_lazy, "sums": self.is_lazy and self.sums > 0, "state": True}
        at_a_time = max((max(sizes) for name, sizes in moved.items() if goes[name]), default=0)
        return self._largest_bucket() + at_a_time + sum(sum(sizes) for name, sizes in moved.items() if not goes[name])

    def _largest_bucket(self) -> int:
        most = max(bucket.flat_param.nbytes for bucket in self.rehearsal.buckets)
        return min(most, self.rehearsal.bucket_bytes)

    def _parameters_twice(self) -> int:
        """Pages go one parameter after the other; other memory of a bucket, when the last one has left it."""
        if self.is_lazy:
            most = max(m.numel * bucket.dtype.itemsize for bucket in self.rehearsal.buckets for m in bucket.params)
            return most // self._sharing
        left_by = {m.name: bucket for bucket in self.guessed.buckets for m in bucket.params}
        staying = {bucket.index: len(bucket.params) for bucket in self.guessed.buckets}
        now = most = 0
        for bucket in self.rehearsal.buckets:
            now += bucket.flat_param.nbytes
            most = max(most, now)
            for managed in bucket.params:
                left = left_by[managed.name]
                staying[left.index] -= 1
                if not staying[left.index]:
                    now -= left.flat_param.nbytes
        return most

    def _largest_piece(self) -> int:
        pieces = [
            segment.numel * bucket.master.dtype.itemsize
            for bucket in self.rehearsal.buckets
            for segment in bucket.segments
        ]
        return max(pieces, default=0)

    def _written(self) -> int:
        """This rank's part, copied. Where ranks have the same, each writes a share."""
        ranks = 1 if self.config.placement.shard_state else self.setting.cluster.world_size
        return (self._exact() + self._moments_decoded + self._outer_whole()) // ranks

    def _copies(self) -> int:
        """Two of what this rank would write, in memory of the host, and with several hosts of what one of another would. What codes make
        a rank keep is its own."""
        if not self.setting.copies or not self.is_lazy:
            return 0
        cluster = self.setting.cluster
        ranks = 1 if self.config.placement.shard_state else cluster.world_size
        slots = 4 if cluster.world_size > cluster.host_ranks else 2
        return slots * ((self._exact() + self._moments_decoded) // ranks + self.held.residuals + self._followed())

    @property
    def _moments_decoded(self) -> int:
        """As they are copied and read: 8-bit ones as float32, and their scales."""
        moments = self.held.moments
        if self.config.precision.state_dtype is not torch.int8:
            return moments
        scale = torch.float32.itemsize
        return moments * (ops.QUANT_BLOCK * torch.float32.itemsize + scale) // (ops.QUANT_BLOCK + scale)

    def _followed(self) -> int:
        """What models have of the parameters that this rank steps, where it lags behind the exact values."""
        if self.config.precision.parameter_compression is None:
            return 0
        return sum(bucket.own_param.nbytes for bucket in self.rehearsal.buckets)

    def _read(self) -> int:
        """All that this rank steps, beside what it holds, until all ranks have theirs."""
        return self._exact() + self._moments_decoded + self._outer_whole() + self.rest

    def _outer_whole(self) -> int:
        """Anchors, and the outer optimizer's arrays as they are gathered from all groups."""
        return outer_bytes_saved(self.rehearsal.buckets, self.config)

    def _exact(self) -> int:
        return sum(
            (bucket.own_range[1] - bucket.own_range[0]) * bucket.master.dtype.itemsize
            for bucket in self.rehearsal.buckets
        )


def _sum_of(parts: dict[str, int]) -> int:
    return sum(parts.values())
