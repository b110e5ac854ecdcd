"""What one rank holds in each phase of a training, by what it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..diagnosis.footprint import footprint
from ..options.config import Config
from ..plan.params import Grain
from ..storage.bucket import Bucket
from ..storage.buffer_pool import num_buffers
from .activations import Activations
from .first_backward import waiting_gradients
from .own_step import own_step_bytes
from .rehearsal import Cluster, Rehearsal, Trainee
from .runtime import runtime_bytes

PARTS = (
    "parameters",
    "masters",
    "gradients",
    "state",
    "buffers",
    "staging",
    "activations",
    "scratch",
    "rest",
    "runtime",
)
"""What bytes are for. buffers: full gradient buffers of stage 2. staging: what messages take beside them. rest: frozen parameters
and the model's buffers. scratch: for a while, such as a bucket that is moved. runtime: see `runtime.py`."""


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
    """

    optimizer: torch.optim.Optimizer
    trainees: Sequence[Trainee]
    cluster: Cluster
    built: int
    frozen: int
    model_buffers: int
    module: int | None = None


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
            rehearsal.buckets, rehearsal.stores, setting.optimizer, config, rehearsal.transport, rehearsal.bucket_bytes
        )
        self.held = held
        self.is_lazy = setting.cluster.device == "cpu"  # pages take memory when they are first used
        self.full_gradients = sum(store.full.nbytes for store in rehearsal.stores if store.full is not None)
        self.sums = held.gradients - self.full_gradients
        cast = config.precision.param_dtype is not None
        self.rest = (setting.frozen // 2 if cast else setting.frozen) + setting.model_buffers
        self.buffers = self._touched_buffers() if self.is_lazy else held.buffers
        self.staging = self._staging()

    def phases(self) -> Iterator[Phase]:
        held = self.held
        kept = {"parameters": held.parameters, "masters": held.masters, "gradients": held.gradients}
        state = {"state": held.moments}
        on_the_way = {"buffers": self.buffers, "staging": self.staging}
        own_step = own_step_bytes(self.rehearsal, self.setting.optimizer, self.config, self.setting.cluster.device)
        peak = 0 if self.activations is None else self.activations.peak
        if self.setting.module is None:
            yield self._phase("building", {"parameters": self.setting.built - self.setting.frozen, "rest": self.rest})
        yield self._wrapping()
        yield self._first_backward()
        if self.activations is None or self._moves():
            moving = {**kept, **state} if self.config.step_in_backward else kept
            yield self._phase("moving", {**moving, "scratch": self._moved()})
        yield self._phase("first step", {**kept, **state, **on_the_way})
        yield self._phase("forward and backward", {**kept, **state, **on_the_way, "activations": peak})
        yield self._phase("step", {**kept, **state, **on_the_way, "scratch": own_step})
        yield self._phase("saving", {**kept, **state, **on_the_way, "scratch": self._largest_piece()})
        yield self._phase("saving in the background", {**kept, **state, **on_the_way, "scratch": self._written()})
        yield self._phase("loading", {**kept, **state, **on_the_way, "scratch": self._read()})

    def _phase(self, name: str, parts: dict[str, int]) -> Phase:
        parts = {"rest": self.rest, **parts}
        parts["runtime"] = runtime_bytes(self.setting.cluster.device, self.setting.built, parts.get("activations", 0))
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
        held = self.held
        parts = {"parameters": most[0], "masters": most[1]}
        if self.setting.module is not None:
            parts = {"parameters": held.parameters, "masters": held.masters, "scratch": self.setting.module}
        at_the_end = {
            "parameters": held.parameters,
            "masters": held.masters,
            "gradients": self.sums if self.is_lazy else held.gradients,
            "buffers": 0 if self.is_lazy else held.buffers,
        }
        return self._phase("wrapping", max(parts, at_the_end, key=lambda part: sum(part.values())))

    def _first_backward(self) -> Phase:
        """State does not exist yet, unless backward steps; but where the order of gradients is not known, some wait for their bucket."""
        held = self.held
        parts = {"parameters": held.parameters, "masters": held.masters, "gradients": held.gradients}
        parts |= {"buffers": self.buffers, "staging": self.staging}
        if self.config.step_in_backward:
            parts["state"] = held.moments
        if self.activations is None:
            return self._phase("first backward", parts)
        planned = self.rehearsal if self._is_foreseen else self.guessed
        waiting = waiting_gradients(planned, self.activations, num_buffers(self.config))
        live = [peak + waits for peak, waits in zip(self.activations.peaks, waiting, strict=True)]
        if not self.is_lazy:
            return self._phase("first backward", {**parts, "activations": max(live)})
        filled, most = 0, (0, 0)
        for held_now, gradient in zip(live, (*self.activations.gradients, 0), strict=True):
            most = max(most, (held_now, filled), key=sum)
            filled = min(self.full_gradients, filled + gradient)
        return self._phase("first backward", {**parts, "gradients": self.sums + most[1], "activations": most[0]})

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
        if not transport.needs_staging:
            return 0
        on_their_way = max(1, self.config.bucket_buffers - 1) if self.config.overlap else 1
        sizes = []
        for bucket in self.rehearsal.buckets:
            dtype = self._travels_in(bucket)
            num_bytes = bucket.padded_numel * dtype.itemsize
            if self.held.buffers:
                num_bytes = min(num_bytes, self.held.buffers // num_buffers(self.config))
            sizes.append(transport.staging_of(num_bytes, dtype.itemsize))
        return sum(sorted(sizes, reverse=True)[:on_their_way])

    def _travels_in(self, bucket: Bucket) -> torch.dtype:
        return self.config.wire_dtype or bucket.dtype

    def _moves(self) -> bool:
        """Whether parameters change buckets when the order of gradients is known."""
        before, after = ([{m.name for m in b.params} for b in r.buckets] for r in (self.guessed, self.rehearsal))
        return before != after

    def _moved(self) -> int:
        """What lies by slices and moves exists twice, and what of it is moved at a time a third time, in a buffer of one bucket's size."""
        own = 0 if self._is_foreseen else sum(store.reduced.nbytes for store in self.rehearsal.stores)
        if self.config.step_in_backward:
            own = self.held.moments
        return self.held.masters + own + self._largest_bucket()

    def _largest_bucket(self) -> int:
        most = max(bucket.flat_param.nbytes for bucket in self.rehearsal.buckets)
        return min(most, self.held.buffers // num_buffers(self.config)) if self.held.buffers else most

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
        return (self._exact() + self.held.moments) // ranks

    def _read(self) -> int:
        """All that this rank steps, beside what it holds, until all ranks have theirs."""
        return self._exact() + self.held.moments + self.rest

    def _exact(self) -> int:
        return sum(
            (bucket.own_range[1] - bucket.own_range[0]) * bucket.master.dtype.itemsize
            for bucket in self.rehearsal.buckets
        )
