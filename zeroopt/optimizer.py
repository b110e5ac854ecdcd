"""The optimizer that `zeroopt.wrap` returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _C
from .bucket import Bucket, ManagedParam, ParamState, Segment, make_buckets, make_plan, own_segments
from .collectives import PendingCollective, Transport
from .config import Config
from .errors import ConfigError, NotSupportedError, StateError
from .grad_clip import clip_by, norm_of_shards, norm_of_whole
from .grad_hooks import GradientReducer
from .loss_scaling import agree_on_overflow
from .param_gather import ParamGathers
from .replan import agree_on_order, in_order, is_grouped_alike, move_state
from .shard_state import check_cut, cut_state, pack_state, unpack_state
from .step import ShardStepper

_FORMAT = 3


class ZeroOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state, and whose work, is split over the ranks of a process group.

    `step()` has three phases: finish the reduces of the gradients; step this rank's slice of every bucket, those first that
    the next forward needs first, and start to gather each bucket as soon as its slice is done; return. A parameter's first
    use, in the next forward or elsewhere, waits for its bucket. (ZeRO: Rajbhandari et al., 2020, arXiv:1910.02054.)

    What was taken from a parameter before the step (a view, `.data`, a `state_dict()` of the model) is not waited for, and after
    the first step parameters may have moved to other memory: take such things again after a step, or wrap with
    `overlap=False`, with which `step()` waits for everything and nothing moves.

    `param_groups` is the wrapped optimizer's own list of its own dicts, so options set through either object, or by a
    scheduler made for either, hold for both. The wrapped optimizer itself must no longer be stepped.

    `param.grad`: in stage 0, the mean over all ranks after backward. In stages 1 and 2 the mean exists in slices, each on the
    rank that owns it, and `param.grad` is a `ShardedGradient` that stands for it: torch's clipping, `GradScaler`, clearing,
    norms and multiplying by a number work on it as usual; `full_grad` gives the whole.

    Made by `zeroopt.wrap`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        params: Sequence[ManagedParam],
        buckets: Sequence[Bucket],
        reducer: GradientReducer,
        gathers: ParamGathers,
        transport: Transport,
        seed: int,
    ) -> None:
        self._module = module
        self._inner = optimizer
        self._config = config
        self._params = params
        self._buckets = buckets
        self._reducer = reducer
        self._gathers = gathers
        self._transport = transport
        self._ready = False  # torch's constructor hands its groups to add_param_group
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._ready = True
        self.param_groups = optimizer.param_groups
        self._frozen = self._find_frozen()
        self._take_over_hooks()
        self._take_over_methods()
        self._import_state()
        self._stepper = ShardStepper(optimizer, buckets, reducer.stores, config, seed)
        # Indices of the parameters, in the order in which the plan takes them.
        self._order = [managed.index for managed in reversed(params)]
        self._num_backwards = 0  # of the reducer, at the last step
        self._grad_norm: Tensor | None = None
        self._norm_of_backward = 0
        self._may_replan = config.overlap and transport.world_size > 1
        self._versions = [managed.param._version for managed in params]

    @property
    def stage(self) -> int:
        """ZeRO stage: 0, 1 or 2."""
        return self._config.stage

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A GradScaler asks before it looks at gradients, which a rank without a backward of its own has yet to get.

        Collective, as `step` is, where a rank has run no backward.
        """
        self._take_part()
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters. Collective: every rank of the process group must call it.

        Args:
            closure: recomputes the loss, with backward; called once, before the step.

        Returns:
            What the closure returned, else None.

        Raises:
            StateError: parameters were moved, replaced or unfrozen, gradients of a backward under `no_sync()` were never
                reduced, the last backward raised, or the ranks' loss scales differ.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_ready()
        self._take_part()
        self._gathers.finish_all()
        # From here on this rank reads no parameters, until it gets the new ones.
        everyone_came = self._transport.start_rendezvous("step")
        active = self._finish_reduces()
        overflow = self._agree_on_overflow()
        if not overflow:
            self._update(active, everyone_came)
        everyone_came.finish()
        self._gathers.leave_to_readers()
        self._reducer.reclaim()
        self._settle_whole()
        self._reducer.num_steps += 1
        self._num_backwards = self._reducer.num_backwards
        if self._reducer.sharded is not None:
            self._reducer.sharded.scaler_checks.clear()
        if not overflow:
            self._replan_once(active)
        self._note_step_for_schedulers()
        return loss

    def _update(self, active: Tensor, everyone_came: PendingCollective) -> None:
        """Clip gradients, step this rank's slices with them, and start to gather what has been stepped. Collective.

        Args:
            active: uint8 [number of parameters], 1 where there is a gradient to step with.
            everyone_came: after which no rank reads parameters any more.
        """
        if self._config.max_grad_norm is not None:
            self._clip(active, self._config.max_grad_norm, 2.0)
        if any(m.param._version != version for m, version in zip(self._params, self._versions, strict=True)):
            self.take_up_writes()
        self._note_changes(active)
        if self._config.share_parameters:  # stepping writes what the other ranks read
            everyone_came.finish()
        for bucket in self._step_buckets(active):
            everyone_came.finish()
            self._gathers.start(bucket)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients: those in `param.grad` and the reduced ones of this step.

        Not collective, but it waits for reduces that are still on their way.

        Args:
            set_to_none: False leaves gradients of zero, with which parameters that had a gradient are still stepped.
        """
        if set_to_none:
            self._reducer.discard()
        else:
            self._reducer.zero()
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of the state. Not collective, and works before the first step.

        Returns:
            A dict like torch's ("state" by position of the parameter, "param_groups"), whose tensors are 1-D pieces of
            this rank, and under "zeroopt" the layout that says of which elements. Save one on every rank. With
            `param_dtype`, "master_param" (float32) or "remainder" (int16) completes the parameters of the model's own state
            dict; 8-bit state comes with its scales, "exp_avg_scale" and the like.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        segments = list(self._segments())
        with_masters = {shard: dict(entry) for shard, entry in self._inner.state.items()}
        for bucket in self._buckets:
            bucket.hand_over(with_masters)
        state, layout = pack_state(with_masters, segments, self._params)
        result: dict[str, Any] = {
            "state": state,
            "param_groups": self._pack_groups(),
            "zeroopt": {
                "format": _FORMAT,
                **self._identity(),
                "seed": self._stepper.seed,
                "order": list(self._order),
                **layout,
            },
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict()` gave on this rank, or the whole state dict of the plain torch optimizer.

        Every rank has to load its own. Collective when the state was saved after buckets were planned anew (after the first
        step) and this optimizer's have not been, or the other way round: its buckets then follow the saved ones.

        Raises:
            StateError: the state belongs to other parameters, another rank, world size, stage or bucket size, or its
                groups are of other sizes. Nothing has been changed.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, dict(state_dict))
            state_dict = state_dict if changed is None else changed
        layout = state_dict.get("zeroopt")
        self._check_groups(state_dict["param_groups"])
        if layout is not None:
            self._check_identity(layout)
            self._follow_order(layout)
        state = unpack_state(state_dict["state"], layout, self._segments())
        self._inner.state.clear()
        self._inner.state.update(state)
        for bucket in self._buckets:
            bucket.take_back(self._inner.state)
        if layout is not None:
            self._stepper.seed = layout["seed"]
        self._stepper.adopt_state()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: _copy(v) for k, v in saved.items() if k not in ("params", "param_names")})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not supported yet after wrapping: the buckets are planned when `zeroopt.wrap` is called."""
        if self._ready:
            raise NotSupportedError("add_param_group after zeroopt.wrap is not supported yet; add all groups before")
        # The groups are checked and complete already; going through torch's method would only copy their lists.
        self.param_groups.append(param_group)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients of this step so that their norm, as if they were one vector, is at most `max_norm`.

        Does under every stage what `torch.nn.utils.clip_grad_norm_` does for the averaged gradients of
        DistributedDataParallel. In stages 1 and 2 it needs no pass of its own: the step multiplies as it goes. Call it between
        backward and step. Collective: every rank of the process group must call it, one without a backward too.

        Args:
            max_norm: the largest norm to leave; gradients of a smaller one stay as they are.
            norm_type: p of the p-norm, positive; `float("inf")` for the largest element.

        Returns:
            The norm before clipping, a 0-dim float32 tensor, the same on all ranks.

        Raises:
            ConfigError: `norm_type` is not positive.
            StateError: as `step`.
        """
        if not norm_type > 0:
            raise ConfigError(f"expected norm_type to be positive or inf, got {norm_type!r}")
        self._check_ready()
        self._take_part()
        norm = self._clip(self._finish_reduces(), float(max_norm), float(norm_type))
        self._settle_whole()
        return norm

    @property
    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients, as if they were one vector, a 0-dim float32 tensor, the same on all ranks.

        After clipping by the 2-norm, with `max_grad_norm` or `clip_grad_norm_`, it is the norm before that, until the next
        backward; inf when a GradScaler has skipped a step that was to clip. Any rank may then read it. Otherwise it is computed
        from the gradients that there are, which is collective: read it on every rank.

        Raises:
            StateError: as `step`.
        """
        if self._grad_norm is None or self._norm_of_backward != self._reducer.num_backwards:
            self._check_ready()
            self._take_part()
            return self._compute_norm(self._finish_reduces(), 2.0).float()
        return self._grad_norm

    def full_grad(self, param: Tensor) -> Tensor | None:
        """The whole gradient of a parameter, the mean over all ranks. Collective: every rank must call it.

        Returns:
            A copy, of the parameter's shape and of the dtype in which gradients are summed (float32 for 16-bit parameters with
            `param_dtype`, in stages 1 and 2); None when no rank has a gradient for it.

        Raises:
            ConfigError: the parameter is not one that this optimizer trains.
            StateError: as `step`.
        """
        managed = self._managed(param)
        self._check_ready()
        self._take_part()
        if not self._finish_reduces()[managed.index]:
            return None
        if self._reducer.sharded is None:
            return managed.param.grad.clone() if managed.param.grad is not None else None
        piece = self._reducer.sharded.piece(managed.index)
        return self._assemble(managed, piece, self._reducer.sum_dtype(managed.index))

    def full_parameter(self, param: Tensor) -> Tensor:
        """The whole of a parameter as precisely as it is kept: float32 where `param_dtype` gives it a master or a remainder.
        Collective: every rank must call it.

        Returns:
            A copy, of the parameter's shape.

        Raises:
            ConfigError: the parameter is not one that this optimizer trains.
        """
        managed = self._managed(param)
        bucket = next(bucket for bucket in self._buckets if managed in bucket.params)
        if bucket.master is None:
            return managed.param.detach().clone()
        self._gathers.finish(bucket.index)
        bucket.take_up_writes()
        pieces = [s for s in bucket.segments if s.owner is managed]
        return self._assemble(managed, bucket.exact(pieces[0]) if pieces else None, torch.float32)

    def full_state_dict(self) -> dict[str, Any]:
        """Not supported yet."""
        raise NotSupportedError("full_state_dict is not supported yet; save state_dict() on every rank")

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Not supported yet."""
        raise NotSupportedError("consolidate_state_dict is not supported yet; save state_dict() on every rank")

    @property  # type: ignore[override]
    def state(self) -> Mapping[Tensor, ParamState]:
        """State by model parameter: 1-D tensors over the part of the parameter that this rank owns (ranks that own none
        of a parameter have no entry for it). The tensors are live, the mapping is read-only."""
        inner = self._inner.state
        return MappingProxyType({s.owner.param: inner[s.shard] for s in self._segments() if s.shard in inner})

    @state.setter
    def state(self, value: Any) -> None:
        # torch's constructor sets an empty state; the wrapped optimizer keeps the real one.
        assert not self._ready, "the state of a ZeroOptimizer is replaced through load_state_dict"

    def __getstate__(self) -> dict[str, Any]:
        raise NotSupportedError("a ZeroOptimizer cannot be copied or pickled; save and load its state_dict()")

    def __repr__(self) -> str:
        where = f"stage={self.stage}, rank={self._transport.rank}, world_size={self._transport.world_size}"
        return f"ZeroOptimizer({where}, transport={self._transport.name}, {self._inner!r})"

    def _managed(self, param: Tensor) -> ManagedParam:
        for managed in self._params:
            if managed.param is param:
                return managed
        raise ConfigError(
            f"expected a parameter that this optimizer trains, got another tensor of shape {list(param.shape)}"
        )

    def _assemble(self, managed: ManagedParam, piece: Tensor | None, dtype: torch.dtype) -> Tensor:
        """A tensor of a parameter's shape from the pieces that ranks have of it. Collective."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        whole = torch.zeros(managed.numel, dtype=wide, device=managed.param.device)
        segment = next((segment for segment in self._segments() if segment.owner is managed), None)
        if piece is not None and segment is not None:
            whole[segment.start : segment.start + segment.numel] = piece
        if self._config.placement.shard_state and self._transport.world_size > 1:
            dist.all_reduce(whole, group=self._transport.group)  # the pieces of other ranks are zero here
        return whole.to(dtype).as_strided(managed.shape, managed.stride)

    def _take_part(self) -> None:
        """A rank that has run no backward since the last step takes part in that of the others, with zeros."""
        if self._transport.world_size == 1 or self._num_backwards != self._reducer.num_backwards:
            return
        if self._reducer.is_cleared:
            self._reducer.take_part()

    def _agree_on_overflow(self) -> bool:
        """Whether a GradScaler's step is to be skipped. Collective where there is one.

        For the time of its step it sets `found_inf` and `grad_scale`, as the fused optimizers of torch have them.
        """
        if "found_inf" not in vars(self):
            return False
        sharded = self._reducer.sharded
        checks = [] if sharded is None else sharded.scaler_checks
        seen = vars(self)["found_inf"]
        found_inf = seen if isinstance(seen, Tensor) else None  # the number 0 where it has looked at no gradients
        overflow = agree_on_overflow(found_inf, vars(self)["grad_scale"], checks, self._reducer.stores, self._transport)
        self._note_factors()
        if overflow and self._config.max_grad_norm is not None:
            self._grad_norm = torch.tensor(torch.inf, device=self._params[0].param.device)
            self._norm_of_backward = self._reducer.num_backwards
        return overflow

    def _note_factors(self) -> None:
        """The gradients of whole buckets have been given a factor."""
        if self._reducer.sharded is not None:
            self._reducer.sharded.changed()

    def _settle_whole(self) -> None:
        """Stage 0: `param.grad` is to show gradients as they are."""
        if not self._config.placement.shard_state:
            for store in self._reducer.stores:
                store.settle()

    def _clip(self, active: Tensor, max_norm: float, norm_type: float) -> Tensor:
        """Clip the gradients that are there, by a factor that has yet to be applied. Returns the norm before it.

        Collective in stages 1 and 2.
        """
        self._reducer.norm_type = norm_type  # from the next backward on, buckets have theirs ready
        norm = self._compute_norm(active, norm_type)
        clip_by(self._reducer.stores, norm, max_norm)
        self._note_factors()
        self._grad_norm = norm.float() if norm_type == 2 else None
        self._norm_of_backward = self._reducer.num_backwards
        return norm.float()

    def _compute_norm(self, active: Tensor, norm_type: float) -> Tensor:
        """0-dim float64, the same on all ranks. Collective in stages 1 and 2."""
        stores = self._reducer.stores
        if self._config.placement.shard_state:
            return norm_of_shards(stores, self._transport, norm_type)
        grads = [
            [m.param.grad for m in bucket.params if active[m.index] and m.param.grad is not None]
            for bucket in self._buckets
        ]
        return norm_of_whole(stores, grads, norm_type)

    def _finish_reduces(self) -> Tensor:
        """Phase one. Returns uint8 [number of parameters], 1 where there is a gradient to step with."""
        self._reducer.finish()
        active = self._reducer.take_visible()
        if not active.all():
            self._check_replaced()
        return active

    def _check_ready(self) -> None:
        """Raise StateError before anything is changed."""
        self._reducer.check_storage()
        self._check_frozen()
        if self._reducer.has_local_gradients:
            raise StateError(
                "the last backward ran under no_sync(), so its gradients were never reduced; run the last backward before "
                "step() or clip_grad_norm_() outside of no_sync(), or call zero_grad() to drop them"
            )

    def _step_buckets(self, active: Tensor) -> Iterator[Bucket]:
        """Phase two. Yields the buckets that have to be gathered, as soon as each one's own slice is done."""
        # What was used on any rank, on which all ranks agree, and what the user has set besides.
        flags = (active | self._reducer.used).tolist()
        for bucket in self._stepper.step(active):
            if self._config.placement.shard_state and any(flags[managed.index] for managed in bucket.params):
                yield bucket

    def _replan_once(self, active: Tensor) -> None:
        """After the first step: plan the buckets in the order in which the gradients arrived. Collective."""
        if self._may_replan and bool(active.any()):
            self._may_replan = False
            self._replan(agree_on_order(self._reducer.arrivals, self._params, self._transport.group))

    def _replan(self, order: Sequence[int]) -> None:
        """Move parameters, gradients and state into buckets for another order. Collective."""
        ordered = in_order(self._params, order)
        plan = self._make_plan(ordered)
        if is_grouped_alike(self._buckets, plan, ordered):
            return
        self._gathers.finish_all()
        self._reducer.finish()
        self._stepper.adopt_state()
        shard_state = self._config.placement.shard_state
        self._reducer.hand_over(self._inner.state)
        for bucket in self._buckets:
            bucket.hand_over(self._inner.state)
        moved = move_state(self._inner.state, self._buckets, plan, ordered, self._transport, shard_state=shard_state)
        self._reducer.let_go()
        for bucket in self._buckets:
            self._transport.free(bucket.flat_param)
            bucket.let_go()
        shared = self._config.share_parameters
        self._buckets = make_buckets(
            plan, ordered, self._transport, self._config.precision, shard_state=shard_state, shared=shared
        )
        for segment in self._segments():
            if segment.owner.index in moved:
                self._inner.state[segment.shard] = moved.pop(segment.owner.index)
        for bucket in self._buckets:
            bucket.take_back(self._inner.state)
        if shared:
            self._transport.barrier()  # the writers are through
        self._reducer.adopt(self._buckets)
        self._reducer.take_back(self._inner.state)
        self._gathers.adopt(self._buckets)
        self._stepper.adopt(self._buckets, self._reducer.stores)
        self._order = list(order)

    def take_up_writes(self) -> None:
        """Parameters were written by something other than a step: let float32 masters follow. Not collective."""
        for bucket in self._buckets:
            bucket.take_up_writes()

    def _make_plan(self, ordered: Sequence[ManagedParam]) -> _C.Plan:
        return make_plan(ordered, self._transport.world_size, self._config.bucket_bytes, self._config.precision)

    def _segments(self) -> Iterator[Segment]:
        for bucket in self._buckets:
            yield from bucket.segments

    def _check_replaced(self) -> None:
        """A parameter without a gradient may be one that the model no longer has."""
        present = set(self._module.parameters())
        for managed in self._params:
            if managed.param not in present:
                raise StateError(
                    f"parameter {managed.name!r} is no longer part of the model: a module was replaced after "
                    "zeroopt.wrap. Change the model first, then wrap it"
                )

    def _find_frozen(self) -> list[tuple[str, Tensor]]:
        managed = {m.param for m in self._params}
        own = {p for group in self.param_groups for p in group["params"]}
        return [(name, p) for name, p in self._module.named_parameters() if p in own and p not in managed]

    def _check_frozen(self) -> None:
        """A parameter that did not require gradients when it was wrapped is in no bucket."""
        for name, param in self._frozen:
            if param.grad is not None:
                raise StateError(
                    f"parameter {name!r} was frozen when zeroopt.wrap was called and now has a gradient, which is not "
                    "supported yet; set requires_grad before wrapping"
                )

    def _follow_order(self, layout: Mapping[str, Any]) -> None:
        """Plan the buckets as they were when a state was saved. Collective when that changes them."""
        order = list(layout["order"])
        if sorted(order) != list(range(len(self._params))):
            raise StateError(f"the state dict is of {len(order)} parameters, this optimizer has {len(self._params)}")
        ordered = in_order(self._params, order)
        plan = self._make_plan(ordered)
        for bucket in range(len(plan.buckets)):
            for piece in own_segments(plan, bucket, self._transport, shard_state=self._config.placement.shard_state):
                check_cut(layout, ordered[piece.param], piece.start, piece.numel)
        if order != self._order:
            self._may_replan = False
            self._replan(order)

    def _note_changes(self, active: Tensor) -> None:
        """Kernels and transports write behind autograd's back; tell it, so that it can refuse a backward through a graph
        that was recorded before the step."""
        for managed, flag in zip(self._params, active.tolist(), strict=True):
            if flag:
                torch.autograd.graph.increment_version(managed.param)
        self._versions = [managed.param._version for managed in self._params]

    def _take_over_methods(self) -> None:
        """Who still holds the wrapped optimizer clears gradients, or is refused, as if it were this one."""
        self._inner.zero_grad = self.zero_grad  # type: ignore[method-assign]
        self._inner.add_param_group = self.add_param_group  # type: ignore[method-assign]

    def _take_over_hooks(self) -> None:
        """Step hooks registered on the wrapped optimizer fire on this one, once a step."""
        inner = self._inner
        self._optimizer_step_pre_hooks = inner._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = inner._optimizer_step_post_hooks
        inner._optimizer_step_pre_hooks = OrderedDict()
        inner._optimizer_step_post_hooks = OrderedDict()

    def _import_state(self) -> None:
        """State that the optimizer had before it was wrapped: keep this rank's part of it."""
        state = self._inner.state
        own: dict[Tensor, ParamState] = {
            segment.shard: cut_state(state[segment.owner.param], segment)
            for segment in self._segments()
            if segment.owner.param in state
        }
        for managed in self._params:
            state.pop(managed.param, None)
        state.update(own)

    def _note_step_for_schedulers(self) -> None:
        """A scheduler made before wrapping watches the wrapped optimizer's step(), which fused kernels do not call."""
        if hasattr(self._inner.step, "_wrapped_by_lr_sched"):
            self._inner._opt_called = True  # type: ignore[attr-defined]

    def _identity(self) -> dict[str, int | str]:
        transport, precision = self._transport, self._config.precision
        return {
            "stage": self.stage,
            "rank": transport.rank,
            "world_size": transport.world_size,
            "slice": transport.slice_index,  # another one where ranks are on other hosts
            "param_dtype": str(precision.param_dtype),
            "master_weights": precision.master_weights,
            "state_dtype": str(precision.state_dtype),
        }

    def _pack_groups(self) -> list[dict[str, Any]]:
        packed, first = [], 0
        for group in self.param_groups:
            options = {name: _copy(value) for name, value in group.items() if name != "params"}
            packed.append({**options, "params": list(range(first, first + len(group["params"])))})
            first += len(group["params"])
        return packed

    def _check_groups(self, saved: Sequence[Mapping[str, Any]]) -> None:
        mine = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) for group in saved]
        if mine != theirs:
            raise StateError(f"expected param_groups of {mine} parameters, the state dict has {theirs}")

    def _check_identity(self, layout: Mapping[str, Any]) -> None:
        if layout["format"] != _FORMAT:
            raise StateError(f"expected a state dict of format {_FORMAT}, got {layout['format']}; update zeroopt")
        for name, value in self._identity().items():
            if layout[name] != value:
                raise StateError(
                    f"the state dict was saved with {name}={layout[name]}, this optimizer has {name}={value}; loading "
                    "shards into another layout is not supported yet"
                )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
