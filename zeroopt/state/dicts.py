"""Saving and loading the state of a `ZeroOptimizer`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from .._C import Plan
from ..collectives import Transport
from ..collectives.control import lone_control
from ..errors import StateError
from ..options.config import Config
from ..options.precision import Precision
from ..plan.agreement import describe_options
from ..plan.dtensors import place_in_mesh
from ..plan.ownership import Ownership
from ..plan.params import ManagedParam, ParamState
from ..stepping.rules import rule_for
from ..stepping.step_counts import with_exact_counts
from ..stepping.stepper import ShardStepper
from ..storage.bucket import Bucket
from ..storage.masters import MASTER_NAMES, exact_param
from ..storage.segment import Segment
from .consolidate import gather_state
from .entries import OUTER, map_tensors, pack_state
from .layout import ShardLayout, describe_layout
from .live import StateHolder
from .saved import SavedState, positions_of
from .tiers import readable
from .torch_releases import brought_up_to_date


@dataclass(frozen=True)
class LoadedState:
    """State that has been read, and belongs to nobody yet.

    Attributes:
        state: by segment's shard, and by the parameter for those that no rank steps.
        groups: the options of each param_group.
        layout: None where a plain torch optimizer saved it.
        begun: positions of the parameters of which some rank may have state.
        kept: positions of parameters whose state stays as it is.
    """

    state: dict[Tensor, ParamState]
    groups: Sequence[Mapping[str, Any]]
    layout: ShardLayout | None
    begun: set[int]
    kept: frozenset[int] = frozenset()


class StepCounter(Protocol):
    """What counts steps since something has last happened."""

    steps: int


class OuterState(Protocol):
    """What keeps the state of outer steps."""

    def save_state(self) -> dict[Tensor, ParamState]:
        """By the shards of segments. Collective over the average group."""

    def save_options(self) -> list[dict[str, Any]]:
        """Of the outer optimizer's param_groups."""

    def load_state(self, state: dict[Tensor, ParamState], options: list[dict[str, Any]]) -> None:
        """Go on from what was saved; without any, begin anew."""


class StateDicts(StateHolder):
    """The state dicts of one optimizer.

    Attributes:
        params, buckets: those of the optimizer, which may change.
        begun: positions of the parameters of which some rank may have state.
        consolidated: the whole state, on the rank that it was gathered on, as long as it is current.
        outer: the outer steps, which somebody else has, for they use this; None where there are none.

    Args:
        stepper: that of the optimizer.
        since_average: counts the steps since parameters were averaged; None where they are not.
    """

    def __init__(
        self,
        transport: Transport,
        ownership: Ownership,
        inner: torch.optim.Optimizer,
        params: Sequence[ManagedParam],
        buckets: Sequence[Bucket],
        stepper: ShardStepper,
        config: Config,
        since_average: StepCounter | None,
    ) -> None:
        self._transport = transport
        self._ownership = ownership
        self._inner = inner
        self.params = params
        self.buckets = buckets
        self._stepper = stepper
        self._config = config
        self._since_average = since_average
        self.begun: set[int] = set()
        self.consolidated: dict[str, Any] | None = None
        self._outer: weakref.ref[OuterState] | None = None
        self._index = _Index((), ())

    @property
    def outer(self) -> OuterState | None:
        return None if self._outer is None else self._outer()

    @outer.setter
    def outer(self, outer: OuterState | None) -> None:
        self._outer = None if outer is None else weakref.ref(outer)

    def note_begun(self, active: Tensor) -> None:
        """A step has come to parameters: from now on they may have state.

        Args:
            active: uint8 [number of parameters of the model], 1 where there was a gradient.
        """
        if len(self.begun) < len(self.params):
            flags = active.tolist()
            self.begun.update(managed.position for managed in self.params if flags[managed.index])

    def shard(self, order: Sequence[Sequence[int]], *, all_in_state: bool = False) -> dict[str, Any]:
        """This rank's state dict. Collective over the average group where there are outer steps.

        Args:
            order: in which the parameters were planned.
            all_in_state: whoever asks keeps what stands under "state", and nothing else.
        """
        state = {shard: readable(entry) for shard, entry in self.saved_state().items()}
        packed = pack_state(state, self._segments(), self.params)
        has_more = self.outer is not None or any(bucket.master.completes for bucket in self.buckets)
        shown = set(packed) if has_more and all_in_state else self.begun
        entries = {position: entry for position, entry in packed.items() if position in shown} | self.idle_state()
        beyond = {p: entry for p, entry in packed.items() if p not in shown} if has_more else {}
        layout = self._layout(self._segments(), {"rank": self._transport.control.rank, **self.facts()}, order, beyond)
        return {
            "state": dict(sorted(entries.items())),
            "param_groups": self.pack_groups(),
            "zeroopt": layout.to_dict(),
        }

    def whole(self, to: int) -> dict[str, Any] | None:
        """The state dict of the plain torch optimizer, on rank `to` alone. Collective."""
        transport = self._transport
        alone = self._ownership.has_all
        saved = self.saved_state()
        if alone and transport.control.rank != to and transport.control.size > 1:
            return None
        rule = rule_for(self._inner)
        state = gather_state(
            saved,
            list(self._segments()) if alone or transport.replica == 0 else (),
            self.params,
            lone_control() if alone else transport.control,
            0 if alone else to,
            has_step=rule is None or rule.has_step,
        )
        if state is None:
            return None
        idle = {p: map_tensors(entry, lambda tensor: tensor.cpu().clone()) for p, entry in self.idle_state().items()}
        result = {"state": dict(sorted((state.torch | idle).items())), "param_groups": self.pack_groups()}
        if state.beyond or self._since_average is not None:
            layout = ShardLayout(
                self.facts(),
                self.seed,
                self.steps_since_average,
                beyond_torch=state.beyond,
                outer_options=self.outer_options,
            )
            result["zeroopt"] = layout.to_whole_dict()
        return result

    def whole_for(self, ranks: Sequence[int]) -> dict[str, Any]:
        """The whole state on some ranks, with all that belongs to it by parameter; nothing but the groups elsewhere. Collective."""
        mine: dict[int, ParamState] = {}
        for rank in ranks:
            whole = self.whole(rank)
            if whole is not None:
                beyond = whole.get("zeroopt", {}).get("state", {})
                positions = sorted(whole["state"].keys() | beyond.keys())
                mine = {p: {**whole["state"].get(p, {}), **beyond.get(p, {})} for p in positions}
        return {"state": mine, "param_groups": self.pack_groups()}

    def current(self, order: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The whole state dict where it has been consolidated, else this rank's shard.

        Args:
            order: in which the parameters were planned.
        """
        if self.consolidated is None:
            return self.shard(order)
        beyond = self.consolidated.get("zeroopt", {}).get("state", {})
        return {
            "state": {position: dict(entry) for position, entry in self.consolidated["state"].items()},
            "param_groups": self.pack_groups(),
            "zeroopt": self._layout((), self.facts(), order, beyond).to_dict(),
        }

    def _layout(
        self,
        segments: Iterable[Segment],
        facts: Mapping[str, Any],
        order: Sequence[Sequence[int]],
        beyond: Mapping[int, ParamState],
    ) -> ShardLayout:
        return describe_layout(
            self.params,
            segments,
            facts=facts,
            seed=self.seed,
            steps_since_average=self.steps_since_average,
            part=place_in_mesh(self.params),
            order=order,
            beyond_torch=beyond,
            outer_options=self.outer_options,
        )

    def read(
        self, shards: Iterable[Mapping[str, Any]], *, of_all_ranks: bool = False, keeps: bool = False
    ) -> LoadedState:
        """What is to become of this rank's state. Changes nothing, and is not collective.

        Args:
            of_all_ranks: shards have to be those of all ranks of a run.
            keeps: tensors in them are nobody else's, and may become the state as they are.

        Raises:
            StateError: it does not fit, or something is missing.
        """
        saved = SavedState(
            self._segments(),
            self.params,
            self.idle_params(),
            place_in_mesh(self.params),
            self._inner.state,
            keeps_codes=self._keeps_codes,
            keeps=keeps,
        )
        groups: Sequence[Mapping[str, Any]] | None = None
        layout: ShardLayout | None = None
        for shard in shards:
            self._check_groups(shard["param_groups"])
            saved.take(shard)
            if groups is None:
                groups, layout, begun = shard["param_groups"], ShardLayout.of(shard), positions_of(shard)
            del shard  # before the next one is read
        if groups is None:
            raise StateError("expected a state dict, or those of all ranks of a run; got an empty sequence")
        keys = {segment.owner.position: segment.shard for segment in self._segments()} | self.idle_params()
        members = [[keys[position] for position in group["params"] if position in keys] for group in self.pack_groups()]
        state, options = brought_up_to_date(self._inner, saved.finish(of_all_ranks=of_all_ranks), groups, members)
        return LoadedState(state, options, layout, begun)

    def adopt(self, loaded: LoadedState) -> None:
        """Let loaded state be the optimizer's. Where it `completes_params`, this writes them too, and they have to be gathered."""
        state = self._inner.state
        self.consolidated = None
        self.begun = set(loaded.begun)
        completed = self._complete(loaded.state)
        outer = _take_out_outer(loaded.state)
        for segment in self._segments():
            if segment.owner.position not in loaded.kept:
                state.pop(segment.shard, None)
        state.update(loaded.state)
        self._take_masters(state)
        for bucket, segment, values in completed:
            bucket.master.write(*segment.range, values)
        if loaded.layout is not None:
            self._stepper.seed = loaded.layout.seed
        if self._since_average is not None:
            self._since_average.steps = 0 if loaded.layout is None else loaded.layout.steps_since_average
        self._stepper.reload_state()
        for group, options in zip(self._inner.param_groups, loaded.groups, strict=True):
            group.update({name: _copy(value) for name, value in options.items()})
        if self.outer is not None:  # last, for it looks at parameters
            self.outer.load_state(outer, [] if loaded.layout is None else list(map(dict, loaded.layout.outer_options)))

    def take_in_state(self, taken: Sequence[Bucket]) -> None:
        """State that the optimizer had before it was wrapped, keyed by parameters: keep this rank's part of it.

        Args:
            taken: the buckets of the parameters that have just been taken in, whose values are the exact ones.
        """
        state = self._inner.state
        held = {m.position: state[m.param] for m in self.params if m.param in state and m.numel}
        saved = SavedState(
            self._segments(), self.params, {}, place_in_mesh(self.params), {}, keeps_codes=self._keeps_codes
        )
        saved.take({"state": held, "param_groups": self.pack_groups()})
        own = saved.finish()
        for managed in self.params:
            if managed.numel:
                state.pop(managed.param, None)
        state.update(own)
        self._take_masters(state)  # of parameters that were trained before
        for bucket in taken:
            bucket.master.follow_writes(bucket.segments)

    def idle_state(self) -> dict[int, ParamState]:
        """State of the parameters that no rank steps, by position: the same on all ranks, as it was made or loaded."""
        state = self._inner.state
        return {position: dict(state[param]) for position, param in self.idle_params().items() if param in state}

    def idle_params(self) -> dict[int, Tensor]:
        """The parameters that are frozen or have no elements, by position."""
        stepped = {managed.position for managed in self.params if managed.numel}
        params = chain.from_iterable(group["params"] for group in self._inner.param_groups)
        return {position: param for position, param in enumerate(params) if position not in stepped}

    def pack_groups(self) -> list[dict[str, Any]]:
        """The param_groups as torch saves them, with positions in place of parameters."""
        packed, first = [], 0
        for group in self._inner.param_groups:
            options = {name: _copy(value) for name, value in group.items() if name != "params"}
            packed.append({**options, "params": list(range(first, first + len(group["params"])))})
            first += len(group["params"])
        return packed

    def matches(self, layout: ShardLayout) -> bool:
        """Whether what was saved is whole, or a shard of exactly the elements that this rank has now."""
        return not layout.is_shard or layout.ranges == {
            s.owner.position: (s.start, s.start + s.numel) for s in self._segments()
        }

    def would_match(self, layout: ShardLayout, plan: Plan, ordered: Sequence[ManagedParam]) -> bool:
        """Whether what was saved is whole, or a shard of exactly the elements that this rank would have under another plan."""
        if not layout.is_shard:
            return True
        pieces = self._ownership.segments(plan)
        return layout.ranges == {ordered[p.param].position: (p.start, p.start + p.numel) for p in pieces}

    def describe_loaded(self, loaded: LoadedState) -> list[str]:
        """What ranks have to have in common of what they are about to adopt."""
        layout = loaded.layout
        lines = describe_options(loaded.groups)
        if self._since_average is None:  # with it, ranks have seeds of their own
            return [f"seed {self.seed if layout is None else layout.seed}", *lines]
        return [f"{0 if layout is None else layout.steps_since_average} steps since parameters were averaged", *lines]

    def completes_params(self, loaded: LoadedState) -> bool:
        """Whether what completes this rank's parameters in loaded state is of another kind than here, so that it changes them."""
        return any(
            (loaded.state.get(segment.shard, {}).keys() & set(MASTER_NAMES)) - {bucket.master.name}
            for bucket in self.buckets
            if _is_exact(bucket)
            for segment in bucket.segments
        )

    def _complete(self, state: dict[Tensor, ParamState]) -> list[tuple[Bucket, Segment, Tensor]]:
        """Take out of loaded state what completes parameters, where they are completed by something else here. Returns the exact
        values of parameters that can take them up."""
        completed = []
        for bucket in self.buckets:
            for segment in bucket.segments:
                entry = state.get(segment.shard, {})
                foreign = (entry.keys() & set(MASTER_NAMES)) - {bucket.master.name}
                if not foreign:
                    continue
                exact = exact_param(entry, segment.view_in(bucket.master.param))
                for name in foreign:
                    del entry[name]
                if not entry:
                    del state[segment.shard]
                if exact is not None and _is_exact(bucket):
                    completed.append((bucket, segment, segment.flatten(exact.view(segment.shard.shape))))
        return completed

    def with_masters(self) -> dict[Tensor, ParamState]:
        """State by segment, with what completes 16-bit parameters in it."""
        state = {shard: dict(entry) for shard, entry in with_exact_counts(self._inner.state).items()}
        for bucket in self.buckets:
            for segment in bucket.segments if bucket.master.completes else ():
                state.setdefault(segment.shard, {}).update(bucket.master.arrays(segment))
        return state

    def saved_state(self) -> dict[Tensor, ParamState]:
        """Likewise, with all that belongs to outer steps. Collective over the average group where there are any."""
        state = self.with_masters()
        for shard, entry in ({} if self.outer is None else self.outer.save_state()).items():
            state.setdefault(shard, {})[OUTER] = entry
        return state

    def _take_masters(self, state: MutableMapping[Tensor, ParamState]) -> None:
        """Let masters be what completes parameters in their state, and have it there no longer."""
        for bucket in self.buckets:
            for segment in bucket.segments if bucket.master.completes else ():
                entry = state.get(segment.shard)
                if entry is not None:
                    bucket.master.take(segment, entry)
                    if not entry:
                        del state[segment.shard]

    def params_with_state(self) -> Iterator[Tensor]:
        begun = {managed.position: managed.param for managed in self.params if managed.position in self.begun}
        idle = {position: param for position, param in self.idle_params().items() if param in self._inner.state}
        yield from list((begun | idle).values())

    def entry_of(self, param: Tensor) -> ParamState | None:
        managed = self._indexed().params.get(param)
        has_begun = managed is not None and managed.position in self.begun
        if managed is None or not managed.numel:
            return self._inner.state.get(param, {} if has_begun else None)
        if not has_begun:
            return None
        bucket, segment = self._indexed().segments.get(managed, (None, None))
        if bucket is None or segment is None:
            return {}
        entry = dict(self._inner.state.get(segment.shard, {}))
        return entry | bucket.master.arrays(segment)

    def extend_entry(self, param: Tensor, name: str, value: Any) -> bool:
        entry = self._inner.state.get(self._key_of(param))
        if entry is None:
            return False
        entry[name] = value
        return True

    def reset(self, params: Iterator[Tensor]) -> None:
        for param in list(params):
            managed = self._indexed().params.get(param)
            if managed is not None:
                self.begun.discard(managed.position)
            self._inner.state.pop(self._key_of(param), None)
        self.consolidated = None
        self._stepper.reload_state()

    def _key_of(self, param: Tensor) -> Tensor:
        """The key of a parameter's state in the wrapped optimizer."""
        managed = self._indexed().params.get(param)
        found = None if managed is None else self._indexed().segments.get(managed)
        return param if found is None else found[1].shard

    def _indexed(self) -> _Index:
        if not self._index.is_of(self.params, self.buckets):
            self._index = _Index(self.params, self.buckets)
        return self._index

    def _segments(self) -> Iterator[Segment]:
        for bucket in self.buckets:
            yield from bucket.segments

    @property
    def _keeps_codes(self) -> bool:
        return self._config.precision.state_dtype is torch.int8

    @property
    def precision(self) -> Precision:
        """In what parameters and state are kept."""
        return self._config.precision

    @property
    def seed(self) -> int:
        """Of stochastic rounding, the same on all ranks."""
        return self._stepper.seed

    @property
    def steps_since_average(self) -> int:
        """See `averaging`; 0 without it."""
        return 0 if self._since_average is None else self._since_average.steps

    @property
    def outer_options(self) -> list[dict[str, Any]]:
        """Of the outer optimizer's param_groups; empty where there is none."""
        return [] if self.outer is None else self.outer.save_options()

    def facts(self) -> dict[str, Any]:
        """How the state is kept, the same on all ranks; plain JSON."""
        precision = self._config.precision
        return {
            "stage": self._config.stage,
            "world_size": self._transport.control.size,
            "param_dtype": str(precision.param_dtype),
            "master_weights": precision.master_weights,
            "state_dtype": str(precision.state_dtype),
        }

    def _check_groups(self, saved: Sequence[Mapping[str, Any]]) -> None:
        mine = [len(group["params"]) for group in self._inner.param_groups]
        theirs = [len(group["params"]) for group in saved]
        if mine != theirs:
            raise StateError(f"expected param_groups of {mine} parameters, the state dict has {theirs}")


class _Index:
    """Where to find what belongs to a parameter."""

    def __init__(self, params: Sequence[ManagedParam], buckets: Sequence[Bucket]) -> None:
        self._key = _key(params, buckets)
        self.params: dict[Tensor, ManagedParam] = {managed.param: managed for managed in params}
        self.segments = {s.owner: (bucket, s) for bucket in buckets for s in bucket.segments}

    def is_of(self, params: Sequence[ManagedParam], buckets: Sequence[Bucket]) -> bool:
        """Whether these are still those that it is of."""
        return self._key == _key(params, buckets)


def _key(params: Sequence[ManagedParam], buckets: Sequence[Bucket]) -> list[Any]:
    return [*params, *((bucket, len(bucket.segments)) for bucket in buckets)]


def _is_exact(bucket: Bucket) -> bool:
    """Whether its parameters are kept as float32 values."""
    return bucket.master.dtype is torch.float32


def _take_out_outer(state: dict[Tensor, ParamState]) -> dict[Tensor, ParamState]:
    """Take out of loaded state what belongs to outer steps."""
    outer = {shard: entry.pop(OUTER) for shard, entry in state.items() if OUTER in entry}
    for shard in outer:
        if not state[shard]:
            del state[shard]
    return outer


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
