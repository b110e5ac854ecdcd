"""Saving and loading the state of a `ZeroOptimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _C, ops
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
from .shard_state import pack_state
from .sharding import Sharding
from .state_tiers import decoded, exact_param
from .step import ShardStepper


@dataclass(frozen=True)
class LoadedState:
    """State that has been read, and belongs to nobody yet.

    Attributes:
        state: by segment's shard.
        groups: param_groups, of which the options count.
        layout: None where a plain torch optimizer saved it.
    """

    state: dict[Tensor, ParamState]
    groups: Sequence[Mapping[str, Any]]
    layout: ShardLayout | None


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

    def shard(self, order: Sequence[Sequence[int]], *, has_begun: bool) -> dict[str, Any]:
        """This rank's state dict.

        Args:
            order: in which the parameters were planned.
            has_begun: whether any rank may have state.
        """
        with_masters = self.with_masters()
        layout = describe_layout(
            self.params,
            self._segments(),
            facts={"rank": self._transport.rank, **self.facts()},
            seed=self.seed,
            steps_since_average=self.steps_since_average,
            part=place_in_mesh(self.params),
            order=order,
        )
        return {
            "state": pack_state(with_masters, self._segments(), self.params) if has_begun else {},
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
        result = {"state": state.torch, "param_groups": self.pack_groups()}
        if state.beyond:
            layout = ShardLayout(self.facts(), self.seed, self.steps_since_average, beyond_torch=state.beyond)
            result["zeroopt"] = layout.to_whole_dict()
        return result

    def read(self, shards: Iterable[Mapping[str, Any]], *, keeps: bool = False) -> LoadedState:
        """What is to become of this rank's state. Changes nothing, and is not collective.

        Args:
            keeps: whether tensors that are what is needed may be kept; else all are copied.

        Raises:
            StateError: it does not fit, or something is missing.
        """
        saved = SavedState(self._segments(), self.params, place_in_mesh(self.params), self._inner.state, keeps=keeps)
        groups: Sequence[Mapping[str, Any]] | None = None
        layout: ShardLayout | None = None
        for shard in shards:
            self._check_groups(shard["param_groups"])
            saved.take(shard)
            if groups is None:
                groups, layout = shard["param_groups"], ShardLayout.of(shard)
        if groups is None:
            raise StateError("expected a state dict, or those of all ranks of a run; got an empty sequence")
        return LoadedState(self._in_tier(saved.finish()), groups, layout)

    def adopt(self, loaded: LoadedState) -> bool:
        """Let loaded state be the optimizer's. Returns whether parameters were written too, which then have to be gathered."""
        state = self._inner.state
        completed = self._complete(loaded.state)
        for segment in self._segments():
            state.pop(segment.shard, None)  # what frozen parameters have stays
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
        return bool(completed)

    def take_in_state(self) -> None:
        """State that the optimizer had before it was wrapped, keyed by parameters: keep this rank's part of it."""
        state = self._inner.state
        held = {managed.position: state[managed.param] for managed in self.params if managed.param in state}
        saved = SavedState(self._segments(), self.params, place_in_mesh(self.params), {})
        saved.take({"state": held, "param_groups": self.pack_groups()})
        own = saved.finish()
        for managed in self.params:
            state.pop(managed.param, None)
        state.update(own)

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

    def _in_tier(self, state: dict[Tensor, ParamState]) -> dict[Tensor, ParamState]:
        """Where moments are not kept in 8 bits here: without codes."""
        if self._config.precision.state_dtype is torch.int8:
            return state
        return {shard: decoded(entry) if _has_codes(entry) else entry for shard, entry in state.items()}

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


def _has_codes(entry: ParamState) -> bool:
    return any(name.endswith(ops.SCALE_SUFFIX) for name in entry)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
