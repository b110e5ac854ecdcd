"""The optimizer that `zeroopt.wrap` returns."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _C
from .admission.group_edits import GroupEdit, GroupMembers, inspect_edit
from .diagnosis.footprint import log_wrapped
from .errors import ConfigError, NotSupportedError, StateError
from .feature import Step
from .features.averaging import ParameterAverage
from .features.join import Phase, take_options
from .features.loss_scaling import scaler_in
from .features.of_model import ModelFeatures
from .features.scaled_steps import ScaledSteps
from .gradients.norms import clip_by
from .inner_attributes import reach, takes
from .options.config import Config, check_param_dtypes
from .plan.agreement import agree
from .plan.buckets import agree_on_order, in_order, is_grouped_alike, make_plan
from .plan.params import ManagedParam
from .profiling import named_range
from .replica import Sharding
from .state.dcp_options import ranks_that_want_all, takes_state_alone, wants_parts, with_flattened_names
from .state.dicts import LoadedState, StateDicts
from .state.given import GivenState
from .state.layout import ShardLayout
from .state.live import LiveState
from .state.moving import log_new_plan, move_state
from .state.whole_tensors import whole_states
from .stepping.stepper import ShardStepper, check_fused
from .storage.assembling import assemble
from .storage.bucket import Bucket, Segment, make_buckets
from .storage.gradient_store import GradientStore
from .untraced import untraced


class ZeroOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state, and whose work, is split over the ranks of a process group.

    `step()` has three phases: finish the reduces of the gradients; step this rank's slice of every bucket, those first that
    the next forward needs first, and start to gather each bucket as soon as its slice is done; return. A parameter's first
    use, in the next forward or elsewhere, waits for its bucket. (ZeRO: Rajbhandari et al., 2020, arXiv:1910.02054.)

    What was taken from a parameter before the step (a view, `.data`, a `state_dict()` of the model) is not waited for, and after
    the first step parameters may have moved to other memory: take such things again after a step, or wrap with
    `overlap=False`, with which `step()` waits for everything and nothing moves.

    `param_groups` is the wrapped optimizer's own list of its own dicts, so options set through either object, or by a
    scheduler made for either, hold for both. The wrapped optimizer itself must no longer be stepped. Parameters may be taken out
    of groups, moved and put in by hand, on all ranks alike: that holds from the next call of the optimizer, or the next forward
    of the model, which is then collective whatever it is.

    `param.grad`: in stage 0, the mean over all ranks after backward. In stages 1 and 2 the mean exists in slices, each on the
    rank that owns it, and `param.grad` is a `ShardedGradient` that stands for it: torch's clipping, `GradScaler`, clearing,
    norms and changing it in place element by element work on it as usual; `full_grad` gives the whole.

    Where the wrapped optimizer has `train()` and `eval()`, which exchange the parameters for others, this one has them too, and
    they are collective: every rank must call them, of this or of the wrapped one. Its plain attributes can be read and set here.

    Made by `zeroopt.wrap`.
    """

    def __init__(
        self,
        sharding: Sharding,
        features: ModelFeatures,
        optimizer: torch.optim.Optimizer,
        params: Sequence[ManagedParam],
        config: Config,
        average: ParameterAverage | None = None,
    ) -> None:
        self.number = 0  # among the optimizers of the model
        self._average = average
        self._sharding = sharding
        self._features = features
        self._join = features.join
        self._module = sharding.module
        self._inner = optimizer
        self._config = config
        self._reducer = sharding.reducer
        self._gathers = sharding.gathers
        self._transport = sharding.transport
        self._ready = False  # torch's constructor hands its groups to add_param_group
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._ready = True
        self._members = GroupMembers()
        self._params: list[ManagedParam] = []
        self._buckets: list[Bucket] = []
        self._generations: list[list[int]] = []
        self._versions: list[int] = []
        # By the parameters that came before: those of two optimizers are not rounded alike.
        seed = (sharding.seed + params[0].index) % 2**63
        if average is not None:
            seed = average.vary_seed(seed)
        self._stepper = ShardStepper(optimizer, seed, config)
        self._state_dicts = StateDicts(sharding, optimizer, self._params, self._buckets, self._stepper, config, average)
        self._state = LiveState(self._state_dicts)
        self._take_in(params)
        self._members.note(self.param_groups)
        self._stepper.adopt(self._buckets, self._stores)
        self._take_over_hooks()
        self._take_over_methods()
        self._grad_norm: Tensor | None = None
        self._norm_of_backward = 0
        self._clipped_backward = -1  # whose gradients `max_grad_norm` has clipped
        self._scaled_steps = ScaledSteps(sharding, features.join, self, self._buckets)
        sharding.optimizers.append(self)
        log_wrapped(self._buckets, self._stores, optimizer, config, self._transport)

    def _take_in(self, params: Sequence[ManagedParam]) -> None:
        """Have parameters trained from now on. Collective."""
        self._buckets += self._sharding.take_in(params, self._config.precision)
        self._params += params
        # Positions in `_params`, in the order in which the plan takes them; a plan for each time that some were taken in.
        first = len(self._params) - len(params)
        self._generations.append(list(reversed(range(first, len(self._params)))))
        self._frozen = self._find_frozen()
        self._versions += [managed.param._version for managed in params]
        self._state_dicts.begun.update(m.position for m in params if m.param in self._inner.state)
        self._state_dicts.take_in_state()
        self._plan_again()

    def _plan_again(self) -> None:
        """Have buckets planned by the order of the gradients once more."""
        # Ranks that average their parameters must have cut them alike.
        self._may_replan = self._config.overlap and self._transport.world_size > 1 and self._average is None
        self._taken_in_after = self._reducer.num_backwards

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._ready:  # torch's constructor begins with an empty list
            self._inner.param_groups = groups

    @property
    def _stores(self) -> list[GradientStore]:
        return [self._reducer.stores[bucket.index] for bucket in self._buckets]

    @property
    def sharding(self) -> Sharding:
        """What the optimizer shares with the model."""
        return self._sharding

    @property
    def state_dicts(self) -> StateDicts:
        """How its state is saved and loaded."""
        return self._state_dicts

    @property
    def stage(self) -> int:
        """ZeRO stage: 0, 1 or 2."""
        return self._config.stage

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks for when its `step` begins: whether it is to call `step` here whatever it has found.

        It is, where a step does more than to step (`average_every`) and where the scaler refuses to unscale (float16 gradients,
        stage 0). Elsewhere it unscales, and steps or does not step, as with any optimizer of torch.

        Collective, as `step` is: in a GradScaler's `step` ranks agree on what they have found, and everywhere a rank that has
        run no backward takes part in that of the others.
        """
        self._take_part()
        scaler = scaler_in(sys._getframe(1))
        skips = scaler is not None and self._note_overflow(self._scaled_steps.begin(scaler))
        return self._average is not None or (not skips and self._scaled_steps.unscale_in_step)

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters. Collective: every rank of the process group must call it. With `average_every`, in each k-th
        step every rank of the average group as well.

        Args:
            closure: recomputes the loss, with backward; called once, before the step.

        Returns:
            What the closure returned, else None.

        Raises:
            StateError: parameters were moved, replaced or unfrozen, gradients of a backward under `no_sync()` were never
                reduced, or the last backward raised.
            ConfigError, NotSupportedError: `param_groups` were edited, and cannot be trained as they are. Nothing has been changed.
            RankMismatchError: they were edited in another way on another rank; on all ranks. Nothing has been changed.
            NonFiniteError, RankMismatchError: with `check_every`, on all ranks; see `zeroopt.wrap`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_up_groups()
        self._check_ready()
        self._take_part()
        for bucket in self._buckets:
            self._gathers.finish(bucket.index)
        step = self._describe_step()
        for before_step in self._features.features.calls["before_step"]:
            before_step(step)
        # From here on this rank reads no parameters, until it gets the new ones.
        everyone_came = self._transport.start_rendezvous("step")
        active = self._finish_reduces()
        overflow = self._finish_unscaling()
        self._state_dicts.consolidated = None
        if overflow:
            active.zero_()
        begun = self._state_dicts.begun
        if len(begun) < len(self._params):
            flags = active.tolist()
            begun.update(managed.position for managed in self._params if flags[managed.index])
        if not overflow and self._config.max_grad_norm is not None:
            self._clip_by_model(active, self._config.max_grad_norm)
        if any(m.param._version != version for m, version in zip(self._params, self._versions, strict=True)):
            self.take_up_writes()
        averages = self._average is not None and self._average.is_due()
        self._note_changes(torch.ones_like(active) if averages else active)
        if self._config.share_parameters:  # stepping writes what the other ranks read
            everyone_came.finish()
        for bucket in self._average_buckets(active) if averages else self._step_buckets(active, skip=overflow):
            everyone_came.finish()
            self._gathers.start(bucket)
        everyone_came.finish()
        self._gathers.leave_to_readers()
        self._reducer.reclaim()
        self._reducer.view.settle(self._stores)
        self._reducer.note_step()
        if not overflow:
            self._replan_once(active)
        for after_step in self._features.features.calls["after_step"]:
            after_step(step)
        self._note_step_for_schedulers()
        return loss

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients: those in `param.grad` and the reduced ones of this step.

        Not collective, but it waits for reduces that are still on their way.

        Args:
            set_to_none: False leaves gradients of zero, with which parameters that had a gradient are still stepped.
        """
        self.take_up_groups()
        if set_to_none:
            self._reducer.discard(self._buckets)
        else:
            self._reducer.zero(self._buckets)
        super().zero_grad(set_to_none)
        if self._join.is_on:
            self._join.note(Phase.ZERO_GRAD, self.number, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of the state; after `consolidate_state_dict`, until the next step or load, all of it on the rank to
        which it went. Not collective, unless `param_groups` have just been edited, and works before the first step.

        Collective too where `get_optimizer_state_dict` of torch calls it with `full_state_dict=True`.

        Returns:
            A dict like torch's ("state" by position of the parameter, "param_groups"), and under "zeroopt" the layout that says
            which elements this rank has. Where it has all of a parameter, tensors are plain ones of the parameter's shape; where
            it has some, `ShardTensor`s, which `torch.save` writes as plain 1-D tensors of these elements; where it has none,
            the entry is empty. With `param_dtype`, "master_param" (float32) or "remainder" (int16) completes the parameters
            of the model's own state dict. 8-bit state is decoded to float32, a copy, with its scales beside it
            ("exp_avg_scale" and the like), from which the same codes are found again. All other tensors are live.

            Save one on every rank, with `torch.save`, or with torch.distributed.checkpoint, which understands it as it is.

        Raises:
            NotSupportedError: it is called by `set_optimizer_state_dict` of torch with `full_state_dict=True`.
        """
        caller, size = sys._getframe(1), self._transport.world_size
        wanted = ranks_that_want_all(caller, size) if self._config.placement.shard_state and size > 1 else ()
        self.take_up_groups()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if wanted:
            self._join.check_outside("get_optimizer_state_dict(full_state_dict=True)")
            self._gather_number(0, label="get_optimizer_state_dict")
            result = self._state_dicts.whole_for(wanted)
        elif wants_parts(caller):
            result = self._state_dicts.shard(self._generations, all_in_state=takes_state_alone(caller))
        else:
            result = self._state_dicts.current(self._generations)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        """Load state: on every rank, after the model's own state dict.

        Args:
            state_dict: one of
                - what `full_state_dict()` gave, or `state_dict()` of the plain torch optimizer, also with the names of
                  parameters for positions, as `torch.distributed.checkpoint.state_dict` has it. State of a DTensor is a DTensor
                  placed likewise, this rank's local tensor, or the full tensor;
                - what `state_dict()` gave on this rank, with the same world size, stage and bucket size;
                - what `state_dict()` gave on all ranks of another run, in any order, as a list or as an iterator that reads one
                  after the other: of any world size, stage, bucket size, and precision.

        Moments that were kept in another precision are converted; in the same one they come back bit for bit. What completes
        16-bit parameters ("master_param", "remainder") goes into parameters or masters here, to which the model's state dict
        of the same moment belongs.

        Collective: every rank of the process group, and of the mesh of DTensors, must call it. All ranks load, or none.

        Raises:
            StateError: the state belongs to other parameters, some of it is missing, or its groups are of other sizes; or
                within `join()`. Nothing has been changed.
            RankMismatchError: so it is on another rank, or ranks were given different options. Nothing has been changed.
        """
        self._join.check_outside("load_state_dict()")
        self.take_up_groups()
        given = GivenState(with_flattened_names(sys._getframe(1), state_dict), self._prepare_load)
        self._follow_order(given.layout)
        loaded = self._read_together(given)
        rewrites = self._gather_number(self._state_dicts.completes_params(loaded)).any()
        with self.rewriting_parameters() if rewrites else nullcontext():
            self.adopt(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _prepare_load(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, dict(state_dict))
            state_dict = state_dict if changed is None else changed
        return state_dict

    def _read_together(self, given: GivenState) -> LoadedState:
        """What is to become of this rank's state, once every rank has read its own. Collective."""
        loaded: LoadedState | None = None
        problem: Exception | None = None
        lines: list[str] = []
        try:
            loaded = self._state_dicts.read(given.shards(), of_all_ranks=given.of_all_ranks)
            lines = self._state_dicts.describe_loaded(loaded)
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
            problem = error
        groups = [(self._sharding.group, lines), *((group, []) for group in self._sharding.mesh_groups)]
        agree(groups, problem, "load_state_dict")
        assert loaded is not None
        return loaded

    def _gather_number(self, number: float, label: str = "load_state_dict") -> Tensor:
        """A number of each rank, float64 [world_size]. Collective; the transport notices when another rank does something else."""
        value = torch.tensor(number, dtype=torch.float64, device=self._params[0].param.device)
        return self._transport.gather_scalar(value, label=label)

    def adopt(self, loaded: LoadedState) -> None:
        """Let state that was read be this optimizer's. Not collective."""
        self._state_dicts.adopt(loaded)

    @contextmanager
    def rewriting_parameters(self) -> Iterator[None]:
        """Within it, every rank writes its own range of the buckets; then all get them. Collective."""
        self._gathers.finish_all()
        everyone_came = self._transport.start_rendezvous("writing parameters")
        everyone_came.finish()  # nobody reads them any more
        yield
        if self._config.placement.shard_state:
            for bucket in self._buckets:
                self._gathers.start(bucket)
            self._gathers.leave_to_readers()
        self._note_changes(torch.ones(len(self._sharding.params), dtype=torch.uint8))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param_group, as torch's optimizers do. Collective: every rank must add the same.

        Its parameters, which have to be the model's, get buckets of their own behind the others. Those that are frozen are
        taken in when they no longer are. Gradients that there are stay; those of the new parameters become the mean over ranks.

        Raises:
            ConfigError, NotSupportedError, ValueError: the group cannot be trained. Nothing has been changed.
            RankMismatchError: another rank adds something else, or failed; on all ranks. Nothing has been changed.
        """
        if not self._ready:
            # The groups are checked and complete already; going through torch's method would only copy their lists.
            return
        before = len(self.param_groups)
        problem: Exception | None = None
        try:
            type(self._inner).add_param_group(self._inner, param_group)
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
            problem = error
        try:
            self._take_up_groups(problem)
        except Exception:
            del self.param_groups[before:]
            raise

    def take_up_groups(self, *, unfrozen: bool = False) -> None:
        """Go by `param_groups` as they are. Collective where they have been edited since the last time: every rank has to make the
        same of them.

        Args:
            unfrozen: have parameters trained that were frozen and now require gradients, too; collective where there are any.

        Raises:
            ConfigError, NotSupportedError, RankMismatchError: as `step`. Nothing has been changed.
        """
        if self._members.differ(self.param_groups) or (unfrozen and any(p.requires_grad for _, p in self._frozen)):
            self._take_up_groups()

    def _take_up_groups(self, problem: Exception | None = None) -> None:
        """Collective.

        Args:
            problem: what is wrong on this rank, if anything is.
        """
        what = "taking up param_groups"
        self._join.check_outside(what)
        # Told through the transport, which notices when another rank goes on to something else.
        device = self._params[0].param.device
        self._transport.gather_scalar(torch.ones((), dtype=torch.float32, device=device), label="edited param_groups")
        edit = GroupEdit()
        if problem is None:
            try:
                edit = inspect_edit(self._module, self._inner, self._sharding.params, self._params, self._members)
                self._sharding.count_copies(edit.new)
                check_param_dtypes(self._config, {managed.name: managed.param.dtype for managed in edit.new})
                check_fused(self._inner, [*edit.places, *edit.new], self._config)
            except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
                problem = error
        groups = [(self._sharding.group, edit.lines), *((group, []) for group in self._sharding.mesh_groups)]
        agree(groups, problem, what)
        self._apply(edit)

    def _apply(self, edit: GroupEdit) -> None:
        """Collective."""
        begun = [managed for managed in self._params if managed.position in self._state_dicts.begun]
        if edit.gone:
            self._take_out(edit.gone)
        for managed, (group, position) in edit.places.items():
            managed.group, managed.position = group, position
        self._state_dicts.begun = {managed.position for managed in begun if managed in edit.places}
        self._frozen = self._find_frozen()
        if edit.new:
            for index, managed in enumerate(edit.new, len(self._sharding.params)):
                managed.index = index
            self._take_in(edit.new)
        self._members.note(self.param_groups)
        self._stepper.adopt(self._buckets, self._stores)
        self._state_dicts.consolidated = None

    def _take_out(self, params: Sequence[ManagedParam]) -> None:
        """Train parameters no longer: they keep their values, their gradients and, as under torch, their state. Collective."""
        gone = set(params)
        self._reducer.finish()
        grads = self._reducer.view.as_under_torch(params)
        is_local = self._reducer.has_local_gradients
        cut = [segment for segment in self._segments() if segment.owner in gone]
        shares = self._config.placement.shard_state and self._transport.world_size > 1
        group = self._transport.group if shares else None
        states = whole_states(self._state_dicts.with_masters(), cut, params, group)
        self._sharding.take_out(gone)
        self._features.norms.of_model = None
        for segment in cut:
            self._inner.state.pop(segment.shard, None)
        for managed in params:
            if managed in states:
                self._inner.state[managed.param] = states[managed]
            managed.param.grad = grads[managed]
        if is_local:
            self._reducer.untrained.mark({managed.param for managed in params})
        kept = {old: managed for old, managed in enumerate(self._params) if managed not in gone}
        position_of = {old: new for new, old in enumerate(kept)}
        self._versions = [self._versions[old] for old in kept]
        self._params[:] = kept.values()
        orders = [[position_of[old] for old in order if old in position_of] for order in self._generations]
        self._generations = [order for order in orders if order]
        self._plan_again()

    @untraced
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients of this step so that their norm, as if they were one vector, is at most `max_norm`.

        Does under every stage what `torch.nn.utils.clip_grad_norm_` does for the averaged gradients of
        DistributedDataParallel. In stages 1 and 2 it needs no pass of its own: the step multiplies as it goes. Call it between
        backward and step. Collective: every rank of the process group must call it, one without a backward too, and with
        them all ranks that hold other parts of the model: those of the mesh of its DTensors, and of the `norm_group` given to
        `zeroopt.wrap`. The norm covers all parts, every element once; of several optimizers, the parameters of this one.

        Args:
            max_norm: the largest norm to leave; gradients of a smaller one stay as they are.
            norm_type: p of the p-norm, positive; `float("inf")` for the largest element.

        Returns:
            The norm before clipping, a 0-dim float32 tensor, the same on all these ranks.

        Raises:
            ConfigError: `norm_type` is not positive.
            StateError: as `step`.
        """
        if not norm_type > 0:
            raise ConfigError(f"expected norm_type to be positive or inf, got {norm_type!r}")
        self.take_up_groups()
        self._check_ready()
        self._take_part()
        if self._join.is_on:
            self._join.announce(Phase.CLIP, self.number, max_norm, norm_type)
        active = self._finish_reduces()
        self._features.note_norms(float(norm_type))
        with named_range("clip"):
            norm = self._norm(active, float(norm_type), self._stores)
            self._clip(norm, float(max_norm), float(norm_type))
        self._reducer.view.settle(self._stores)
        return norm.float()

    @property
    @untraced
    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients of this optimizer's parameters, as if they were one vector, a 0-dim float32 tensor, the same
        on all ranks; after clipping by `max_grad_norm`, of those of the whole model.

        After clipping by the 2-norm, with `max_grad_norm` or `clip_grad_norm_`, it is the norm before that, until the next
        backward; inf when a GradScaler has skipped a step that was to clip. Any rank may then read it. Otherwise it is computed
        from the gradients that there are, which is collective: read it on every rank.

        Raises:
            StateError: as `step`.
        """
        if self._grad_norm is None or self._norm_of_backward != self._reducer.num_backwards:
            self._join.check_outside("grad_norm")
            self.take_up_groups()
            self._check_ready()
            self._take_part()
            return self._norm(self._finish_reduces(), 2.0, self._stores).float()
        return self._grad_norm

    @untraced
    def full_grad(self, param: Tensor) -> Tensor | None:
        """The whole gradient of a parameter, the mean over all ranks. Collective: every rank must call it.

        Returns:
            A copy, of the parameter's shape and of the dtype in which gradients are summed (float32 for 16-bit parameters with
            `param_dtype`, in stages 1 and 2); None when no rank has a gradient for it.

        Raises:
            ConfigError: the parameter is not one that this optimizer trains.
            StateError: as `step`.
        """
        self._join.check_outside("full_grad()")
        self.take_up_groups()
        managed = self._managed(param)
        self._check_ready()
        self._take_part()
        if not self._finish_reduces()[managed.index]:
            return None
        return self._reducer.view.whole(managed)

    def full_parameter(self, param: Tensor) -> Tensor:
        """The whole of a parameter as precisely as it is kept: float32 where `param_dtype` gives it a master or a remainder.
        Collective: every rank must call it.

        Returns:
            A copy, of the parameter's shape.

        Raises:
            ConfigError: the parameter is not one that this optimizer trains.
        """
        self._join.check_outside("full_parameter()")
        self.take_up_groups()
        managed = self._managed(param)
        bucket = next(bucket for bucket in self._buckets if managed in bucket.params)
        if bucket.master is None:
            return managed.param.detach().clone()
        self._gathers.finish(bucket.index)
        bucket.take_up_writes()
        pieces = [s for s in bucket.segments if s.owner is managed]
        return assemble(
            managed,
            pieces[0] if pieces else None,
            bucket.exact(pieces[0]) if pieces else None,
            torch.float32,
            self._transport if self._config.placement.shard_state else None,
        )

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state in the CPU memory of one rank, for `full_state_dict()`. Collective: every rank of the process
        group must call it.

        It travels parameter by parameter. The other ranks need no more memory than for a piece of one.

        Args:
            to: rank in the process group that gets it.

        Raises:
            ConfigError: there is no such rank. On every rank that asks for it.
            StateError: within `join()`.
        """
        if not 0 <= to < self._transport.group.size():
            raise ConfigError(f"expected a rank below {self._transport.group.size()}, got to={to}")
        self._join.check_outside("consolidate_state_dict()")
        self.take_up_groups()
        self._state_dicts.consolidated = self._state_dicts.whole(to)

    def full_state_dict(self) -> dict[str, Any]:
        """The whole state as `consolidate_state_dict()` has gathered it, on the rank that it went to. Not collective.

        Returns:
            The state dict that the plain torch optimizer would have under DistributedDataParallel: the same keys in the same
            order, and tensors of the parameters' shapes, on the CPU. It loads into that, and here at any world size. 8-bit
            moments are float32 in it. Where there is more to keep (what completes 16-bit parameters, the scales of
            8-bit moments, step counts for stochastic rounding), that is under a further key, "zeroopt", which torch ignores.
            It stays in memory until the next step or load.

        Raises:
            StateError: the state has not been gathered since the last step or load, or went to another rank.
        """
        consolidated = self._state_dicts.consolidated
        if consolidated is None:
            raise StateError(
                f"rank {self._transport.rank} has no whole state: call consolidate_state_dict(to={self._transport.rank}) on all "
                "ranks after the last step, and full_state_dict() on that rank alone"
            )
        return consolidated

    @property  # type: ignore[override]
    def state(self) -> LiveState:
        """State by model parameter: 1-D tensors over the part of the parameter that this rank owns, or all of it where the
        rank owns it whole; an empty entry for a parameter of which only others own something. Empty before the first step.

        The tensors are live: 8-bit moments as codes beside their scales, and what completes 16-bit parameters. What is assigned
        to one is copied into it. `state.clear()`, `del state[param]`, and `optimizer.state = {}` reset it, on all ranks alike:
        the next step begins anew, as with torch's optimizers.

        Raises:
            StateError: something is assigned that does not have the names, shapes and dtypes that there are.
        """
        return self._state

    @state.setter
    def state(self, value: Any) -> None:
        if not self._ready or value is self._state:  # torch's constructor sets an empty one
            return
        if value:
            raise StateError(
                "optimizer.state of a ZeroOptimizer cannot be replaced by another one, only reset, with an empty one: keep "
                "what state_dict() gives on each rank, and give that to load_state_dict()"
            )
        self._state.clear()
        self._state = LiveState(self._state_dicts)

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("_inner")
        if inner is None:
            raise AttributeError(f"'ZeroOptimizer' object has no attribute {name!r}")
        has_all_state = not self._config.placement.shard_state or self._transport.world_size == 1
        return reach(inner, name, has_all_state=has_all_state)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = vars(self).get("_inner")
        if inner is not None and name not in vars(self) and not hasattr(type(self), name) and takes(inner, name, value):
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

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

    def _take_part(self) -> None:
        """A rank that has run no backward since the last step, of whichever optimizer, takes part in that of the others, with
        zeros. Where this optimizer still has gradients of an earlier backward, all ranks have them, and there was no other."""
        reducer = self._reducer
        if self._transport.world_size == 1 or reducer.num_backwards_stepped != reducer.num_backwards:
            return
        if reducer.is_cleared(self._params):
            reducer.mirror_backward()

    def agree_on_overflow(self, found: bool) -> None:
        """Take part in the step of a GradScaler of the ranks that still train, when this one has left `join()`. Collective."""
        self._note_overflow(self._scaled_steps.agree(found))

    def _note_overflow(self, overflow: bool) -> bool:
        if overflow:
            self._reducer.note_skipped_step()
            if self._config.max_grad_norm is not None:
                self._note_norm(torch.tensor(torch.inf, device=self._params[0].param.device))
        return overflow

    def _finish_unscaling(self) -> bool:
        """Whether a GradScaler that steps whatever it has found, on which all ranks have agreed, has found an overflow. If not,
        gradients are multiplied back, where it has left that to the step.

        For the time of its step it sets `found_inf` and `grad_scale`, as the fused optimizers of torch have them.
        """
        if "found_inf" not in vars(self):
            return False
        overflow, grad_scale = bool(vars(self)["found_inf"]), vars(self)["grad_scale"]
        if grad_scale is not None and not overflow:
            # As a GradScaler rounds it: gradients are the same wherever they are multiplied by it.
            inverse = grad_scale.detach().double().reshape(()).reciprocal().float().double()
            for store in self._stores:
                if store.holds_sum:
                    store.scale(inverse)
            self._reducer.view.changed()
        return overflow

    def _norm(self, active: Tensor, norm_type: float, stores: Sequence[GradientStore]) -> Tensor:
        """Of the gradients in some stores, 0-dim float64, the same on all ranks. Collective."""
        return self._reducer.view.norm(stores, active, self._sharding.norm_groups, norm_type)

    def _clip_by_model(self, active: Tensor, max_norm: float) -> None:
        """Clip by the 2-norm of the gradients of the whole model, all its optimizers together. Collective."""
        reducer, norms = self._reducer, self._features.norms
        self._features.note_norms(2.0)
        with named_range("clip"):
            number = reducer.num_backwards
            if norms.of_model is None or norms.of_model[0] != number or self._clipped_backward == number:
                norms.of_model = number, self._norm(active, 2.0, reducer.stores)
            # Otherwise as another optimizer has found it before it clipped its own gradients.
            self._clipped_backward = number
            self._clip(norms.of_model[1], max_norm, 2.0)

    def _clip(self, norm: Tensor, max_norm: float, norm_type: float) -> None:
        """Clip the gradients that are there, by a factor that has yet to be applied."""
        clip_by(self._stores, norm, max_norm)
        self._reducer.view.changed()
        self._note_norm(norm if norm_type == 2 else None)

    def _note_norm(self, norm: Tensor | None) -> None:
        self._grad_norm = None if norm is None else norm.float()
        self._norm_of_backward = self._reducer.num_backwards

    def _finish_reduces(self) -> Tensor:
        """Phase one. Returns uint8 [number of parameters], 1 where there is a gradient to step with."""
        self._reducer.finish()
        active = self._reducer.view.take()
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

    def _describe_step(self) -> Step:
        return Step(
            optimizer=self.number,
            number=self._reducer.num_steps + 1,
            groups=self.param_groups,
            buckets=self._buckets,
            stores=self._stores,
            finish_reduces=self._finish_reduces,
            grad_scale=vars(self).get("grad_scale"),
            is_scaled="found_inf" in vars(self),
        )

    def _average_buckets(self, active: Tensor) -> Iterator[Bucket]:
        """Phase two of a step that averages parameters, of which all may change. Yields as `_step_buckets`."""
        assert self._average is not None
        for bucket in self._average.average(self._stepper.step(active), self._generations):
            if self._config.placement.shard_state:
                yield bucket

    def _step_buckets(self, active: Tensor, *, skip: bool) -> Iterator[Bucket]:
        """Phase two. Yields the buckets that have to be gathered, as soon as each one's own slice is done."""
        if skip:
            return
        # What was used on any rank, on which all ranks agree, and what the user has set besides.
        flags = (active | self._reducer.used).tolist()
        for bucket in self._stepper.step(active):
            if self._config.placement.shard_state and any(flags[managed.index] for managed in bucket.params):
                yield bucket

    def _replan_once(self, active: Tensor) -> None:
        """After the first step with these parameters: go by the order in which their gradients arrived. Collective."""
        seen = self._reducer.num_backwards > self._taken_in_after
        if not self._may_replan or not seen or not bool(active.any()):
            return
        self._may_replan = False
        with named_range("replan"):
            order = agree_on_order(self._reducer.arrivals, self._sharding.params, self._transport.group)
            if self._is_alone():
                self._replan(order)
            else:
                self._reducer.start_in_order(order)

    def _is_alone(self) -> bool:
        """Whether all buckets of the model come from one plan, which another one can replace.

        Whole parameters keep their owner: state of any shape would have to move.
        """
        has_whole = any(managed.is_whole for managed in self._params)
        return len(self._buckets) == len(self._sharding.buckets) and len(self._generations) == 1 and not has_whole

    def _replan(self, order: Sequence[int]) -> None:
        """Move parameters, gradients and state into buckets for another order. Collective."""
        ordered = in_order(self._params, order)
        plan = self._make_plan(ordered)
        if is_grouped_alike([{managed.index for managed in bucket.params} for bucket in self._buckets], plan, ordered):
            return
        log_new_plan(self._buckets, plan, ordered, self._transport)
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
        self._buckets[:] = make_buckets(
            plan, ordered, self._transport, self._config.precision, shard_state=shard_state, shared=shared
        )
        self._sharding.buckets[:] = self._buckets
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
        self._stepper.adopt(self._buckets, self._stores)
        self._generations = [list(order)]

    def take_up_writes(self) -> None:
        """Parameters were written by something other than a step: let float32 masters follow. Not collective."""
        for bucket in self._buckets:
            bucket.take_up_writes()

    def _make_plan(self, ordered: Sequence[ManagedParam]) -> _C.Plan:
        config = self._config
        shard_state = config.placement.shard_state
        return make_plan(
            ordered, self._transport.world_size, config.bucket_bytes, config.precision, shard_state=shard_state
        )

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
        """A parameter that did not require gradients at the last forward is in no bucket."""
        for name, param in self._frozen:
            if param.grad is not None:
                raise StateError(
                    f"parameter {name!r} was frozen and has got a gradient of this rank alone; unfreeze parameters before a "
                    "forward of the model that zeroopt.wrap returned, with gradients enabled"
                )

    def _follow_order(self, layout: ShardLayout | None) -> None:
        """Plan the buckets as they were when shards were saved, where every rank has its own, which does not fit otherwise.
        Collective.

        Args:
            layout: of what this rank is about to load; None where that is no shard.
        """
        order = [] if layout is None else [list(generation) for generation in layout.order]
        plan: _C.Plan | None = None
        ordered: list[ManagedParam] = []
        if len(order) == 1 and sorted(order[0]) == list(range(len(self._params))) and self._is_alone():
            ordered = in_order(self._params, order[0])
            plan = self._make_plan(ordered)
        fits_now = layout is None or self._state_dicts.matches(layout)
        would_fit = layout is not None and plan is not None and self._state_dicts.would_match(layout, plan, ordered)
        # Of 53 bits, which float64 keeps, those above two say which order it is.
        vote = zlib.crc32(repr(order).encode()) * 4 + 2 * fits_now + would_fit
        everyone = [int(vote) for vote in self._gather_number(vote).tolist()]
        alike = all(one >> 2 == vote >> 2 for one in everyone)
        if alike and all(one & 1 for one in everyone) and not all(one & 2 for one in everyone):
            self._may_replan = False
            self._replan(order[0])

    def _note_changes(self, active: Tensor) -> None:
        """Kernels and transports write behind autograd's back; tell it, so that it can refuse a backward through a graph
        that was recorded before the step."""
        flags = active.tolist()
        for managed in self._params:
            if flags[managed.index]:
                torch.autograd.graph.increment_version(managed.param)
        self._versions = [managed.param._version for managed in self._params]

    def _take_over_methods(self) -> None:
        """Who still holds the wrapped optimizer clears gradients, or is refused, as if it were this one."""
        self._inner.zero_grad = self.zero_grad  # type: ignore[method-assign]
        self._inner.add_param_group = self.add_param_group  # type: ignore[method-assign]
        for name in ("train", "eval"):  # of schedule-free ones, which write parameters
            if callable(getattr(type(self._inner), name, None)):
                vars(self)[name] = vars(self._inner)[name] = partial(self._switch, name)

    @torch.no_grad()
    def _switch(self, mode: str) -> None:
        """Do what `train()` or `eval()` of the wrapped optimizer does, on this rank's part of the parameters. Collective."""
        self._join.check_outside(f"{mode}() of an optimizer")
        self._reducer.check_storage()
        self._gathers.finish_all()
        if any(m.param._version != version for m, version in zip(self._params, self._versions, strict=True)):
            self.take_up_writes()
        self._state_dicts.consolidated = None
        with self.rewriting_parameters():
            self._stepper.apply(getattr(type(self._inner), mode))

    def release(self) -> torch.optim.Optimizer:
        """The wrapped optimizer, which no longer knows of this one. Not collective."""
        for name in ("zero_grad", "add_param_group"):
            vars(self._inner).pop(name)
        self._stepper.refusal.remove()
        return self._inner

    def _take_over_hooks(self) -> None:
        """Hooks registered on the wrapped optimizer, at any time, are those of this one, and run once a step."""
        for name, hooks in vars(self._inner).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(self, name, hooks)

    def names(self) -> dict[int, str]:
        """Names of all parameters in the groups, frozen ones too, by their position."""
        names = {param: name for name, param in self._module.named_parameters()}
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return {position: names[param] for position, param in enumerate(params)}

    def check_can_save(self, group: dist.ProcessGroup) -> None:
        """Raise NotSupportedError when ranks of a group that save together train alone."""
        if self._average is not None and group.size() > self._transport.world_size:
            raise NotSupportedError(
                "with average_every, ranks that train alone differ between averagings: save each such group of ranks as a "
                "checkpoint of its own, with its process_group and a path of its own, or save state_dict() on every rank"
            )

    def check_can_join(self) -> None:
        """Raise NotSupportedError when ranks of this optimizer cannot have different numbers of batches."""
        if self._average is not None:
            raise NotSupportedError("join() is not supported with average_every: give every rank as many batches")

    def step_along(self, options: Sequence[Mapping[str, Any]], grad_scale: float | None) -> None:
        """Step as the ranks do that still train, when this one has left `join()`.

        Args:
            options: of their groups.
            grad_scale: of a GradScaler that leaves it to the step to multiply gradients back.
        """
        take_options(self.param_groups, options)
        if grad_scale is None:
            self.step()
            return
        self.grad_scale, self.found_inf = torch.tensor(grad_scale, dtype=torch.float32), torch.tensor(0.0)
        try:
            self.step()
        finally:
            del self.grad_scale, self.found_inf

    def _note_step_for_schedulers(self) -> None:
        """A scheduler made before wrapping watches the wrapped optimizer's step(), which fused kernels do not call."""
        if hasattr(self._inner.step, "_wrapped_by_lr_sched"):
            self._inner._opt_called = True  # type: ignore[attr-defined]
