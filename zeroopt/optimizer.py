"""The optimizer that `zeroopt.wrap` returns."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives.control import lone_control
from .diagnosis.footprint import log_wrapped
from .errors import ConfigError, NotSupportedError, StateError
from .feature import Features, Step
from .features.averaging import Averaging, ParameterAverage
from .features.clipping import Clipping
from .features.grad_scaler import GradScaling, scaler_in
from .features.growth import Growth
from .features.join import Phase, take_options
from .features.of_model import ModelFeatures
from .features.outer.steps import OuterSteps, connect_outer_steps
from .features.replanning import Replanning
from .gradients.view import set_gradients
from .inner_attributes import reach, takes
from .options.config import Config
from .plan.agreement import agree
from .plan.params import ManagedParam
from .profiling import range_of_torch
from .replica import Replica
from .state.dcp_options import ranks_that_want_all, takes_state_alone, wants_parts, with_flattened_names
from .state.dicts import LoadedState, StateDicts
from .state.given import GivenState
from .state.live import LiveState
from .state.own_format import in_torchs_format
from .storage.assembling import assemble
from .storage.bucket import Bucket
from .trained import Trained
from .untraced import untraced
from .weak_methods import weak_method


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
        replica: Replica,
        features: ModelFeatures,
        optimizer: torch.optim.Optimizer,
        params: Sequence[ManagedParam],
        config: Config,
        average: ParameterAverage | None = None,
    ) -> None:
        # By the parameters that came before: those of two optimizers are not rounded alike.
        seed = (replica.seed + params[0].index) % 2**63
        if average is not None:
            seed = average.vary_seed(seed)
        trained = Trained(replica, optimizer, config, seed, average)
        self._trained = trained
        self._replica = replica
        self._inner = optimizer
        self._config = config
        self._reducer = replica.reducer
        self._gathers = replica.gathers
        self._transport = replica.transport
        self._state_dicts = trained.state_dicts
        self._state = LiveState(trained.state_dicts)
        self._ready = False  # torch's constructor hands its groups to add_param_group
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._ready = True
        self._join = features.join
        self._captures = features.captures
        self._of_model = features.features
        self._features = Features()
        self._growth = Growth(
            trained, features.check_between_steps, weak_method(self._follow_growth), features.captures
        )
        self._growth.begin(params)
        self._add_features(features, average)
        self._take_over_hooks()
        self._take_over_methods()
        replica.note_optimizer(self)
        log_wrapped(
            trained.buckets,
            trained.stores,
            optimizer,
            config,
            self._transport,
            replica.bucket_bytes,
            replica.control,
            1 if average is None else average.control.size,
        )

    def _add_features(self, of_model: ModelFeatures, average: ParameterAverage | None) -> None:
        """In the order in which they take part in a step, behind those of the model."""
        trained = self._trained
        self._clipping = Clipping(trained, of_model.norms)
        self._scaling = GradScaling(trained, self, of_model.join, self._clipping)
        # Ranks that average their parameters must have cut them alike.
        may_replan = self._config.overlap and self._transport.control.size > 1 and average is None
        self._replanning = Replanning(trained, of_model.foresight, of_model.captures, allowed=may_replan)
        self._averages = average is not None
        self._features.add(self._scaling, on=False)
        self._features.add(self._clipping, on=self._config.max_grad_norm is not None)
        self._outer: OuterSteps | None = connect_outer_steps(trained, average)
        trained.state_dicts.outer = self._outer
        if average is not None:
            self._features.add(self._outer or Averaging(trained, average))
        self._features.add(self._replanning, on=may_replan)
        self._step_in_backward = of_model.step_in_backward
        if self._step_in_backward is not None:
            self._step_in_backward.take_up(trained, weak_method(self._growth.is_edited), weak_method(self._check_ready))

    def _follow_growth(self) -> None:
        self._clipping.forget_model()
        self._replanning.expect_new_order()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._ready:  # torch's constructor begins with an empty list
            self._inner.param_groups = groups

    @property
    def replica(self) -> Replica:
        """What the optimizer shares with the model."""
        return self._replica

    @property
    def number(self) -> int:
        """Its place among the optimizers of the model."""
        return self._trained.number

    @property
    def state_dicts(self) -> StateDicts:
        """How its state is saved and loaded."""
        return self._state_dicts

    @property
    def stage(self) -> int:
        """ZeRO stage: 0, 1 or 2."""
        return self._config.stage

    @property
    def outer_optimizer(self) -> torch.optim.Optimizer | None:
        """What `outer_optimizer` of `zeroopt.wrap` has made; None without it. A scheduler made of it sets the outer learning rate, on
        all ranks alike. It steps flat slices, and is not to be stepped by anybody else."""
        return None if self._outer is None else self._outer.optimizer

    def ready_outer_steps(self, what: str) -> OuterSteps:
        """The outer steps, for a call that takes part in them without a step of this optimizer.

        Raises:
            NotSupportedError: there are none.
            StateError: parameters were moved or replaced.
        """
        if self._outer is None:
            raise NotSupportedError(f"{what} needs an outer_optimizer, in whose steps a rank without data takes part")
        self.take_up_groups()
        self._reducer.check_parameters()
        return self._outer

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
        if scaler is not None:
            self._config.check_keeps_gradients("a GradScaler")
        skips = scaler is not None and self._scaling.begin(scaler)
        return self._averages or (not skips and self._scaling.unscale_in_step)

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters. Collective: every rank of the process group must call it. With `average_every`, in each k-th
        step every rank of the average group as well.

        On the CPU a rank that needs nothing more may then end, destroy its process group, or drop its model: when its process ends it
        waits, up to 10 seconds, for what others have yet to receive.

        Args:
            closure: recomputes the loss, with backward; called once, before the step.

        Returns:
            What the closure returned, else None.

        Raises:
            StateError: parameters were moved, replaced or unfrozen, gradients of a backward under `no_sync()` were never
                reduced, or the last backward raised; or an earlier step was broken off when it had begun to change parameters
                (Ctrl-C, no memory, a rank that died), from which only a checkpoint leads on.
            ConfigError, NotSupportedError: `param_groups` were edited, and cannot be trained as they are. Nothing has been changed.
            RankMismatchError: they were edited in another way on another rank; on all ranks. Nothing has been changed.
            NonFiniteError, RankMismatchError: with `check_every`, on all ranks; see `zeroopt.wrap`.
        """
        loss = None if closure is None else _evaluate(closure)
        step = self._begin_step()
        if step.is_done:
            self._end_step(step)
            return loss
        # From here on this rank reads no parameters, until it gets the new ones.
        everyone_came = self._transport.start_rendezvous("step")
        self._finish_gradients(step)
        if self._config.share_parameters:  # stepping writes what the other ranks read
            everyone_came.finish()
        with self._reducer.guard.changing(self.number, self._trained.buckets[0].device):
            for bucket in self._update(step):
                self._gathers.start(bucket, everyone_came)
            everyone_came.finish()
            self._end_step(step)
        return loss

    def _begin_step(self) -> Step:
        """What may raise on all ranks comes first: nothing has been changed yet. Collective."""
        self.take_up_groups()
        self._check_ready()
        self._take_part()
        if not self._config.step_in_backward:  # else those on their way are of this very step
            for bucket in self._trained.buckets:
                self._gathers.finish(bucket.index)
        step = self._describe_step()
        self._features.switch(self._scaling, on=step.found_inf is not None)
        self._tell("before_step", step)
        self._tell("may_move", step)
        return step

    def _describe_step(self) -> Step:
        return Step(
            optimizer=self.number,
            number=self._reducer.num_steps + 1,
            groups=self.param_groups,
            buckets=self._trained.buckets,
            stores=self._trained.stores,
            finish_reduces=self._trained.finish_reduces,
            # For the time of its step, a GradScaler sets these two.
            found_inf=vars(self).get("found_inf"),
            grad_scale=vars(self).get("grad_scale"),
        )

    def _finish_gradients(self, step: Step) -> None:
        """Phase one. Collective."""
        active = step.sum_gradients()
        self._tell("on_gradients", step)
        self._state_dicts.consolidated = None
        self._state_dicts.note_begun(active)
        # Before versions are raised for this step, by which other writes are noticed.
        self._trained.follow_writes()
        self._trained.note_changes(torch.ones_like(active) if step.changes_all else active)

    def _update(self, step: Step) -> Iterator[Bucket]:
        """Phase two. Yields the buckets that have to be gathered, as soon as each one's own slice is done."""
        if step.is_skipped and not step.changes_all:
            return
        # What was used on any rank, on which all ranks agree, and what the user has set besides.
        flags = (step.active | self._reducer.used).tolist()
        buckets = self._trained.stepper.step(step.active)
        for stepped in self._calls("stepped"):
            buckets = stepped(step, buckets)
        for bucket in buckets:
            if step.changes_all or any(flags[managed.index] for managed in bucket.params):
                yield bucket

    def _end_step(self, step: Step) -> None:
        """Phase three: parameters are on their way, and whoever reads them waits. Collective."""
        self._gathers.leave_to_readers()
        self._reducer.reclaim()
        self._reducer.view.settle(step.stores)
        self._reducer.note_step()
        # Those of the model last: a check of the step is one of all that the features of this optimizer have made of it.
        for calls in (self._features.calls, self._of_model.calls):
            for after_step in calls["after_step"]:
                after_step(step)
        self._note_step_for_schedulers()

    def _calls(self, name: str) -> Iterator[Callable[..., Any]]:
        """A call's methods of those features that are on: of the model, then of this optimizer."""
        return chain(self._of_model.calls[name], self._features.calls[name])

    def _tell(self, name: str, step: Step) -> None:
        for call in self._calls(name):
            call(step)

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients: those in `param.grad` and the reduced ones of this step.

        Not collective, but it waits for reduces that are still on their way; for those of whole parameters that lie across slices
        until the other ranks wait for theirs, too (in a step, in their own `zero_grad`, or in their next backward).

        Args:
            set_to_none: False leaves gradients of zero, with which parameters that had a gradient are still stepped.
        """
        self.take_up_groups()
        if set_to_none:
            self._reducer.discard(self._trained.buckets)
            # Nothing here looks at values, of which parameters on their way would be asked one by one.
            with (
                torch._C.DisableTorchFunctionSubclass(),
                range_of_torch(f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"),
            ):
                for group in self.param_groups:
                    set_gradients(group["params"], repeat(None))
        else:
            super().zero_grad(set_to_none=False)
            # Behind it, for what is done parameter by parameter leaves unknown that all of a bucket is zero.
            self._reducer.zero(self._trained.buckets)
        if self._join.is_on:
            self._join.note(Phase.ZERO_GRAD, self.number, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shard of the state; after `consolidate_state_dict`, until the next step or load, all of it on the rank to
        which it went. Not collective, unless `param_groups` have just been edited, and works before the first step.

        Collective too where `get_optimizer_state_dict` of torch calls it with `full_state_dict=True`; and over the average group with an
        `outer_optimizer`, whose state is put together: "outer" in the entry of each parameter.

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
            StateError: a step was broken off; see `step`.
        """
        caller = sys._getframe(1)
        self._reducer.guard.check()
        has_all = self._replica.ownership.has_all
        wanted = () if has_all else ranks_that_want_all(caller, self._transport.control.size)
        self.take_up_groups()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if wanted:
            self._join.check_outside("get_optimizer_state_dict(full_state_dict=True)")
            self._trained.gather_number(0, "get_optimizer_state_dict")
            result = self._state_dicts.whole_for(wanted)
        elif wants_parts(caller):
            result = self._state_dicts.shard(self._trained.generations, all_in_state=takes_state_alone(caller))
        else:
            result = self._state_dicts.current(self._trained.generations)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    @torch.inference_mode(mode=False)  # state that is read there could not be stepped
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
            StateError: the state belongs to other parameters, some of it is missing, a step count is none, or its groups are of other
                sizes; or within `join()`; or a CUDA graph of a step has been captured. Nothing has been changed.
            RankMismatchError: so it is on another rank, or ranks were given different options. Nothing has been changed.
        """
        self._join.check_outside("load_state_dict()")
        self.take_up_groups()
        given = GivenState(with_flattened_names(sys._getframe(1), state_dict), self._prepare_load)
        self._replanning.follow_order(given.layout)
        loaded = self._read_together(given)
        completes = self._state_dicts.completes_params(loaded)
        rewrites = self._trained.gather_number(completes, "load_state_dict").any()
        with self.rewriting_parameters() if rewrites else nullcontext():
            self.adopt(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _prepare_load(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, dict(state_dict))
            state_dict = state_dict if changed is None else changed
        return in_torchs_format(self._inner, state_dict)

    def _read_together(self, given: GivenState) -> LoadedState:
        """What is to become of this rank's state, once every rank has read its own. Collective."""
        loaded: LoadedState | None = None
        problem: Exception | None = None
        lines: list[str] = []
        try:
            self.check_may_load("load_state_dict()")
            loaded = self._state_dicts.read(given.shards(), of_all_ranks=given.of_all_ranks)
            lines = self._state_dicts.describe_loaded(loaded)
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
            problem = error
        groups = [(self._replica.control, lines), *((group, []) for group in self._replica.mesh_groups)]
        agree(groups, problem, "load_state_dict")
        assert loaded is not None
        return loaded

    def check_may_load(self, what: str) -> None:
        """Raise StateError where a CUDA graph steps by the state that there is. Not collective."""
        if self._captures is not None:
            self._captures.check_may_replace_state(what)

    def adopt(self, loaded: LoadedState) -> None:
        """Let state that was read be this optimizer's. Not collective."""
        self._state_dicts.adopt(loaded)
        self._reducer.guard.forget(self.number)

    def rewriting_parameters(self, *, exact: bool = True) -> AbstractContextManager[None]:
        """Within it, every rank writes its own range of the buckets; then all get them. Collective.

        Args:
            exact: exact values are written, and models get these; else what models have is, and exact values stay.
        """
        return self._trained.rewriting_parameters(exact=exact)

    @property
    def generations(self) -> Sequence[Sequence[int]]:
        """Numbers of its parameters as they were planned, for each time that some were taken in."""
        return self._trained.generations

    def follow_order(self, order: Sequence[Sequence[int]]) -> None:
        """Plan the buckets as some were that had this order, where nothing stands against it. Collective.

        Args:
            order: as `generations`.
        """
        self._replanning.plan_by(order)

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
            self._growth.take_up_groups(problem)
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
        self._growth.follow_groups(unfrozen=unfrozen)

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
        self._config.check_keeps_gradients("clip_grad_norm_()")
        if not norm_type > 0:
            raise ConfigError(f"expected norm_type to be positive or inf, got {norm_type!r}")
        self.take_up_groups()
        self._check_ready()
        self._take_part()
        if self._join.is_on:
            self._join.announce(Phase.CLIP, self.number, max_norm, norm_type)
        norm = self._clipping.clip(self._trained.finish_reduces(), float(max_norm), float(norm_type))
        self._reducer.view.settle(self._trained.stores)
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
        self._config.check_keeps_gradients("grad_norm")
        known = self._clipping.known_norm
        if known is not None:
            return known
        self._join.check_outside("grad_norm")
        self.take_up_groups()
        self._check_ready()
        self._take_part()
        return self._clipping.compute_norm(self._trained.finish_reduces(), 2.0, self._trained.stores).float()

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
        self._config.check_keeps_gradients("full_grad()")
        self._join.check_outside("full_grad()")
        self.take_up_groups()
        managed = self._trained.managed(param)
        self._check_ready()
        self._take_part()
        if not self._trained.finish_reduces()[managed.index]:
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
        managed = self._trained.managed(param)
        bucket = next(bucket for bucket in self._trained.buckets if managed in bucket.params)
        if not bucket.master.completes:
            return managed.param.detach().clone()
        self._gathers.finish(bucket.index)
        self._trained.follow_writes()
        segment = next((segment for segment in bucket.segments if segment.owner is managed), None)
        return assemble(
            managed,
            segment,
            bucket.master.exact(*segment.range) if segment is not None and self._transport.replica == 0 else None,
            bucket.master.dtype,
            lone_control() if self._replica.ownership.has_all else self._transport.control,
        )

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state in the CPU memory of one rank, for `full_state_dict()`. Collective: every rank of the process
        group must call it.

        It travels parameter by parameter. The other ranks need no more memory than for a piece of one. What was gathered before is
        let go of first, so that a rank does not hold the whole state twice.

        Args:
            to: rank in the process group that gets it.

        Raises:
            ConfigError: there is no such rank. On every rank that asks for it.
            StateError: within `join()`, or a step was broken off; see `step`.
        """
        self._reducer.check_whole()
        if not 0 <= to < self._replica.control.size:
            raise ConfigError(f"expected a rank below {self._replica.control.size}, got to={to}")
        self._join.check_outside("consolidate_state_dict()")
        self.take_up_groups()
        self._state_dicts.consolidated = None
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
                f"rank {self._transport.control.rank} has no whole state: call consolidate_state_dict(to={self._transport.control.rank}) on all "
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
        return reach(inner, name, has_all_state=self._replica.ownership.has_all)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = vars(self).get("_inner")
        if inner is not None and name not in vars(self) and not hasattr(type(self), name) and takes(inner, name, value):
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        raise NotSupportedError("a ZeroOptimizer cannot be copied or pickled; save and load its state_dict()")

    def __repr__(self) -> str:
        where = f"stage={self.stage}, rank={self._transport.control.rank}, world_size={self._transport.control.size}"
        return f"ZeroOptimizer({where}, transport={self._transport.name}, {self._inner!r})"

    def _take_part(self) -> None:
        """A rank that has run no backward since the last step, of whichever optimizer, takes part in that of the others, with
        zeros. Where this optimizer still has gradients of an earlier backward, all ranks have them, and there was no other."""
        reducer = self._reducer
        reducer.take_part()
        if self._transport.control.size == 1 or reducer.num_backwards_stepped != reducer.num_backwards:
            return
        if reducer.is_cleared(self._trained.params) and not self._has_to_step_first():
            reducer.mirror_backward()
            reducer.take_part()

    def _has_to_step_first(self) -> bool:
        """Whether every rank would refuse another backward before this step, though the last one may have left this optimizer no
        gradients."""
        if self._step_in_backward is not None:
            return self._step_in_backward.is_due(self.number)
        return self._config.micro_batches is not None and self._reducer.view.shows_sums

    def agree_on_overflow(self, found: bool) -> None:
        """Take part in the step of a GradScaler of the ranks that still train, when this one has left `join()`. Collective."""
        self._scaling.agree(found)

    def _check_ready(self) -> None:
        """Raise StateError before anything is changed."""
        self._reducer.check_parameters()
        self._growth.check_frozen()
        if self._reducer.has_local_gradients:
            raise StateError(
                "the last backward ran under no_sync(), so its gradients were never reduced; run the last backward before "
                "step() or clip_grad_norm_() outside of no_sync(), or call zero_grad() to drop them"
            )

    def take_up_writes(self) -> None:
        """Parameters were written by something other than a step: let float32 masters follow. Not collective."""
        self._trained.take_up_writes()

    def follow_writes(self) -> None:
        """Let float32 masters follow if something other than a step has written parameters. Not collective."""
        self._trained.follow_writes()

    def _take_over_methods(self) -> None:
        """Who still holds the wrapped optimizer clears gradients, or is refused, as if it were this one, for as long as there is this one.
        Afterwards it has its own methods again, but does not step: nobody averages gradients any more."""
        taken: dict[str, Any] = {
            "zero_grad": weak_method(self.zero_grad),
            "add_param_group": weak_method(self.add_param_group),
        }
        for name in ("train", "eval"):  # of schedule-free ones, which write parameters
            if callable(getattr(type(self._inner), name, None)):
                vars(self)[name] = taken[name] = partial(weak_method(self._switch), name)
        vars(self._inner).update(taken)
        self._when_dropped = weakref.finalize(self, _retire, weakref.ref(self._inner), list(taken))
        self._when_dropped.atexit = False

    @torch.no_grad()
    def _switch(self, mode: str) -> None:
        """Do what `train()` or `eval()` of the wrapped optimizer does, on this rank's part of the parameters. Collective."""
        self._join.check_outside(f"{mode}() of an optimizer")
        self._reducer.check_parameters()
        self._gathers.finish_all()
        self._trained.follow_writes()
        self._state_dicts.consolidated = None
        with self.rewriting_parameters():
            self._trained.stepper.apply(getattr(type(self._inner), mode))

    def release(self) -> torch.optim.Optimizer:
        """The wrapped optimizer, which no longer knows of this one. Not collective."""
        dropped = self._when_dropped.detach()
        assert dropped is not None  # this one is here, and was not released before
        _forget(*dropped[2])
        self._trained.stepper.refusal.remove()
        return self._inner

    def _take_over_hooks(self) -> None:
        """Hooks registered on the wrapped optimizer, at any time, are those of this one, and run once a step."""
        for name, hooks in vars(self._inner).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(self, name, hooks)

    def names(self) -> dict[int, str]:
        """Names of all parameters in the groups, frozen ones too, by their position."""
        names = {param: name for name, param in self._replica.module.named_parameters()}
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return {position: names[param] for position, param in enumerate(params)}

    def check_can_save(self, group: dist.ProcessGroup) -> None:
        """Raise NotSupportedError when ranks of a group that save together train alone, and StateError when a step was broken off."""
        self._reducer.guard.check()
        if self._averages and group.size() > self._transport.control.size:
            raise NotSupportedError(
                "with average_every, ranks that train alone differ between averagings: save each such group of ranks as a "
                "checkpoint of its own, with its process_group and a path of its own, or save state_dict() on every rank"
            )

    def check_can_join(self) -> None:
        """Raise NotSupportedError when ranks of this optimizer cannot have different numbers of batches."""
        if self._averages:
            raise NotSupportedError(
                "join() is not supported with average_every: give every rank as many batches, or, with an outer_optimizer, call "
                "model.leave() where there are no more"
            )
        if self._config.micro_batches is not None:
            raise NotSupportedError(
                "join() is not supported with micro_batches, by which every rank has as many: give every rank as many batches"
            )
        self._config.check_keeps_gradients("join()")

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
        self.grad_scale = torch.tensor(grad_scale, dtype=torch.float32, device="cpu")
        self.found_inf = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        try:
            self.step()
        finally:
            del self.grad_scale, self.found_inf

    def _note_step_for_schedulers(self) -> None:
        """A scheduler made before wrapping watches the wrapped optimizer's step(), which fused kernels do not call."""
        if hasattr(self._inner.step, "_wrapped_by_lr_sched"):
            self._inner._opt_called = True  # type: ignore[attr-defined]


def _forget(owner: weakref.ref[torch.optim.Optimizer], names: Sequence[str]) -> None:
    """Let these methods be those of the class again."""
    optimizer = owner()
    for name in names if optimizer is not None else ():
        vars(optimizer).pop(name, None)


def _retire(owner: weakref.ref[torch.optim.Optimizer], names: Sequence[str]) -> None:
    """What an optimizer was wrapped in has been dropped."""
    _forget(owner, names)
    optimizer = owner()
    if optimizer is not None:
        optimizer.register_step_pre_hook(_refuse_step)


def _refuse_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    raise StateError(
        f"this {type(optimizer).__name__} was wrapped by zeroopt.wrap, and nothing refers to the model and the optimizer any more that it "
        "returned: gradients are no longer averaged over the ranks, and the state is gone. Keep both and train with them; or, to train "
        "the plain model, make a new optimizer, or have zeroopt.unwrap give this one back with its state"
    )


def _evaluate(closure: Callable[[], float]) -> float:
    """Recompute the loss, with backward."""
    with torch.enable_grad():
        return closure()
