"""Saving and loading the state of a `ZeroOptimizer`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import _C
from .averaging import ParameterAverage
from .bucket import MASTER_NAMES, Bucket, ManagedParam, ParamState, Segment, own_segments
from .config import Config
from .consolidate import gather_state
from .errors import StateError
from .fused_rules import rule_for
from .local_tensor import place_in_mesh
from .precision import Precision
from .saved_state import SavedState
from .shard_layout import ShardLayout, describe_layout
from .shard_state import map_tensors, pack_state
from .sharding import Sharding
from .state_tiers import exact_param
from .step import ShardStepper


@dataclass(frozen=True)
class LoadedState:
    """State that has been read, and belongs to nobody yet.

    Attributes:
        state: by segment's shard, and by the parameter for those that no rank steps.
        groups: param_groups, of which the options count.
        layout: None where a plain torch optimizer saved it.
        kept: positions of parameters whose state stays as it is.
    """

    state: dict[Tensor, ParamState]
    groups: Sequence[Mapping[str, Any]]
    layout: ShardLayout | None
    kept: frozenset[int] = frozenset()


class StateDicts:
    """The state dicts of one optimizer.

    Attributes:
        params, buckets: those of the optimizer, which may change.

    Args:
        stepper: that of the optimizer.
    """

    def __init__(
        self,
        sharding: Sharding,
        inner: torch.optim.Optimizer,
        params: Sequence[ManagedParam],
        buckets: Sequence[Bucket],
        stepper: ShardStepper,
        config: Config,
        average: ParameterAverage | None,
    ) -> None:
        self._sharding = sharding
        self._transport = sharding.transport
        self._inner = inner
        self.params = params
        self.buckets = buckets
        self._stepper = stepper
        self._config = config
        self._average = average

    def shard(self, order: Sequence[Sequence[int]], begun: Container[int]) -> dict[str, Any]:
        """This rank's state dict.

        Args:
            order: in which the parameters were planned.
            begun: positions of the parameters of which some rank may have state.
        """
        packed = pack_state(self.with_masters(), self._segments(), self.params)
        has_masters = any(bucket.master is not None for bucket in self.buckets)
        state = {position: entry for position, entry in packed.items() if position in begun} | self.idle_state()
        layout = describe_layout(
            self.params,
            self._segments(),
            facts={"rank": self._transport.rank, **self.facts()},
            seed=self.seed,
            steps_since_average=self.steps_since_average,
            part=place_in_mesh(self.params),
            order=order,
            beyond_torch={p: entry for p, entry in packed.items() if p not in begun} if has_masters else {},
        )
        return {
            "state": dict(sorted(state.items())),
            "param_groups": self.pack_groups(),
            "zeroopt": layout.to_dict(),
        }

    def whole(self, to: int) -> dict[str, Any] | None:
        """The state dict of the plain torch optimizer, on rank `to` alone. Collective."""
        transport = self._transport
        alone = transport.world_size == 1 or not self._config.placement.shard_state
        if alone and transport.group.rank() != to and transport.world_size > 1:
            return None
        rule = rule_for(self._inner)
        state = gather_state(
            self.with_masters(),
            list(self._segments()),
            self.params,
            None if alone else transport.group,
            to,
            has_step=rule is None or rule.has_step,
        )
        if state is None:
            return None
        idle = {p: map_tensors(entry, lambda tensor: tensor.cpu().clone()) for p, entry in self.idle_state().items()}
        result = {"state": dict(sorted((state.torch | idle).items())), "param_groups": self.pack_groups()}
        if state.beyond:
            layout = ShardLayout(self.facts(), self.seed, self.steps_since_average, beyond_torch=state.beyond)
            result["zeroopt"] = layout.to_whole_dict()
        return result

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
                groups, layout = shard["param_groups"], ShardLayout.of(shard)
            del shard  # before the next one is read
        if groups is None:
            raise StateError("expected a state dict, or those of all ranks of a run; got an empty sequence")
        return LoadedState(saved.finish(of_all_ranks=of_all_ranks), groups, layout)

    def adopt(self, loaded: LoadedState) -> None:
        """Let loaded state be the optimizer's. Where it `crosses_tiers`, this writes parameters too, which have to be gathered."""
        state = self._inner.state
        completed = self._complete(loaded.state)
        for segment in self._segments():
            if segment.owner.position not in loaded.kept:
                state.pop(segment.shard, None)
        state.update(loaded.state)
        for bucket in self.buckets:
            bucket.take_back(state)
        for bucket, segment, values in completed:
            bucket.write_exact(segment, values)
        if loaded.layout is not None:
            self._stepper.seed = loaded.layout.seed
        if self._average is not None:
            self._average.steps = 0 if loaded.layout is None else loaded.layout.steps_since_average
        self._stepper.adopt_state()
        for group, saved in zip(self._inner.param_groups, loaded.groups, strict=True):
            group.update({k: _copy(v) for k, v in saved.items() if k not in ("params", "param_names")})

    def take_in_state(self) -> None:
        """State that the optimizer had before it was wrapped, keyed by parameters: keep this rank's part of it."""
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
        for bucket in self.buckets:  # of parameters that were trained before
            bucket.take_back(state)
            bucket.take_up_writes()

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
        """Whether a shard is of exactly the elements that this rank has now."""
        return layout.ranges == {s.owner.position: (s.start, s.start + s.numel) for s in self._segments()}

    def would_match(self, layout: ShardLayout, plan: _C.Plan, ordered: Sequence[ManagedParam]) -> bool:
        """Whether a shard is of exactly the elements that this rank would have under another plan."""
        shard_state = self._config.placement.shard_state
        pieces = [
            piece
            for bucket in range(len(plan.buckets))
            for piece in own_segments(plan, bucket, self._transport, shard_state=shard_state)
        ]
        return layout.ranges == {ordered[p.param].position: (p.start, p.start + p.numel) for p in pieces}

    def crosses_tiers(self, layout: ShardLayout | None) -> bool:
        """Whether saved parameters are completed by something else than here, and here they can take that up. The same on all
        ranks."""
        if layout is None:
            return False
        precision = self._config.precision
        saved = _completion(layout.facts["param_dtype"], layout.facts["master_weights"])
        here = _completion(str(precision.param_dtype), precision.master_weights)
        return saved is not None and saved != here and here != "none"

    def _complete(self, state: dict[Tensor, ParamState]) -> list[tuple[Bucket, Segment, Tensor]]:
        """Take out of loaded state what completes parameters, where they are completed by something else here. Returns the exact
        values of parameters that can take them up."""
        completed = []
        for bucket in self.buckets:
            here = None if bucket.master is None else MASTER_NAMES[bucket.master.dtype]
            for segment in bucket.segments:
                entry = state.get(segment.shard, {})
                foreign = (entry.keys() & set(MASTER_NAMES.values())) - {here}
                if not foreign:
                    continue
                exact = exact_param(entry, segment.view_in(bucket.own_param))
                for name in foreign:
                    del entry[name]
                if not entry:
                    del state[segment.shard]
                if exact is not None and (bucket.master is not None or bucket.dtype is torch.float32):
                    completed.append((bucket, segment, exact.view(segment.shard.shape)))
        return completed

    def with_masters(self) -> dict[Tensor, ParamState]:
        """State by segment, with what completes 16-bit parameters in it."""
        state = {shard: dict(entry) for shard, entry in self._inner.state.items()}
        for bucket in self.buckets:
            bucket.hand_over(state)
        return state

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
        return 0 if self._average is None else self._average.steps

    def facts(self) -> dict[str, Any]:
        """How the state is kept, the same on all ranks; plain JSON."""
        precision = self._config.precision
        return {
            "stage": self._config.stage,
            "world_size": self._transport.world_size,
            "param_dtype": str(precision.param_dtype),
            "master_weights": precision.master_weights,
            "state_dtype": str(precision.state_dtype),
        }

    def _check_groups(self, saved: Sequence[Mapping[str, Any]]) -> None:
        mine = [len(group["params"]) for group in self._inner.param_groups]
        theirs = [len(group["params"]) for group in saved]
        if mine != theirs:
            raise StateError(f"expected param_groups of {mine} parameters, the state dict has {theirs}")


def _completion(param_dtype: str, master_weights: str) -> str | None:
    """By what parameters are completed: "float32" or "remainder"; "none" where 16 bits are all there is; None for float32."""
    return None if param_dtype in ("None", "torch.float32") else master_weights


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
