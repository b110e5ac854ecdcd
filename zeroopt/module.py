"""The model that `zeroopt.wrap` returns."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .ddp_around import check_ddp_around, is_of_ddp, refuse_ddp_around
from .errors import ConfigError, NotSupportedError
from .features.join import JoinCalls, Phase
from .features.of_model import ModelFeatures
from .features.outer.steps import sit_out
from .gradients.sharded_view import ShardedView
from .optimizer import ZeroOptimizer
from .parameters.arriving import remove_idle_hooks
from .parameters.buffers import BufferSync
from .plan.params import ManagedParam
from .replica import Replica
from .storage.bucket import Bucket
from .untraced import untraced, untraced_frame

if TYPE_CHECKING:
    from typing_extensions import Self


class ZeroDataParallel(nn.Module):
    """A model whose gradients are averaged over the ranks of a process group while backward runs.

    It is called and trained like the model in `.module`. Names are the model's own, without a prefix: `state_dict`,
    `load_state_dict`, `named_parameters` and `named_buffers` are those of `.module`, and so is every attribute that this
    class lacks.

    It may be part of a larger module, whose names, state dicts and loading are then as if the model in `.module` were there
    instead.

    A deep copy is one of `.module`: a plain model with parameters of its own, which is what
    `torch.optim.swa_utils.AveragedModel(model)` wants. It cannot be pickled.

    Made by `zeroopt.wrap`.
    """

    module: nn.Module

    def __init__(self, replica: Replica, features: ModelFeatures) -> None:
        super().__init__()
        config, module = replica.config, replica.module
        # Not a child of this one, or "module" would be in the names that a larger module has for what is in it. In its place
        # are its own children.
        self.__dict__["module"] = module
        self.__dict__["_modules"] = module._modules
        self._replica = replica
        self._features = features
        self._join = features.join
        self._captures = features.captures
        self._reducer = replica.reducer
        self._gathers = replica.gathers
        self._transport = replica.transport
        self._shared = config.share_parameters
        self._input_dtype = config.precision.param_dtype if config.cast_inputs else None
        self._buffer_sync: BufferSync | None = None
        if config.broadcast_buffers and replica.transport.control.size > 1 and next(module.buffers(), None) is not None:
            self._buffer_sync = self._reducer.buffer_sync = BufferSync(module, replica.transport.control)
        self._optimizers: list[ZeroOptimizer] = []

    @property
    def replica(self) -> Replica:
        """What the model shares with its optimizers."""
        return self._replica

    @property
    def features(self) -> ModelFeatures:
        """What takes part in its backward passes and steps."""
        return self._features

    @property
    def optimizers(self) -> Sequence[ZeroOptimizer]:
        """Those that train it, in the order of wrapping."""
        return self._optimizers

    def train_with(self, optimizer: ZeroOptimizer) -> None:
        """Add an optimizer that trains parameters of the model."""
        self._optimizers.append(optimizer)

    @untraced_frame
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        With `broadcast_buffers`, ranks first take over the buffers (batch norm statistics and the like) of rank 0. With gradients
        enabled that is collective for the first forward, for the first one after each backward that was not under `no_sync()`, and
        for one that follows another outside of `no_sync()` before its backward (two forwards, one backward).
        Without gradients it is not: the buffers are those that rank 0 had at the end of the last backward (but for those that
        have been written since), so one rank may evaluate alone.

        With `cast_inputs`, floating-point tensors among the arguments, in whatever containers, are cast to `param_dtype`.
        Parameters of an optimizer that were frozen and now require gradients are trained from here on, and param_groups that
        were edited hold.
        """
        if self._captures is not None:
            self._captures.look()
        if torch.is_grad_enabled():
            self._prepare_training()
        elif self._buffer_sync is not None:
            self._buffer_sync.take_sent()
        if self._input_dtype is not None:
            args, kwargs = self._cast_inputs(args, kwargs)
        return self.module(*args, **kwargs)

    @untraced
    def _prepare_training(self) -> None:
        """What comes before a forward with gradients. Collective, where something has to be done on all ranks."""
        check_ddp_around(managed.param for managed in self._replica.params)
        for optimizer in self._optimizers:
            optimizer.take_up_groups(unfrozen=True)
        self._replica.take_up_unfrozen()
        buffers, join = self._buffer_sync, self._join
        follows = buffers is not None and buffers.is_due
        announces = join.is_on and (follows or join.throws)
        if follows or announces:
            self._reducer.take_part()
        if announces:
            join.announce(Phase.FORWARD)
        if follows:
            self._take_over_buffers()
        if buffers is not None:
            buffers.note_forward(sync=self._reducer.sync)

    def _take_over_buffers(self) -> None:
        if self._buffer_sync is not None:
            self._buffer_sync.take_over(self._features.turnout.source)

    @untraced
    def _cast_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(self._cast_input, (args, kwargs))

    def _cast_input(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._input_dtype) if is_float else value

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within this context add to the local `param.grad` and communicate nothing.

        The next backward outside of it takes those gradients along. What counts is where `backward()` is called. Until
        then each rank holds full local gradients, in stages 1 and 2 too. Ranks may run different numbers of backward passes
        within it, but as many outside.
        """
        self._replica.config.check_keeps_gradients("no_sync()")
        before = self._reducer.sync
        self._reducer.sync = False
        try:
            yield
        finally:
            self._reducer.sync = before

    @contextmanager
    def write_parameters(self) -> Iterator[bool]:
        """Change parameters in place, other than by the step: `with model.write_parameters() as mine: if mine: ...`.

        Collective: every rank of the process group must enter and leave it. It yields whether this rank is to write, which
        is True on every rank unless parameters are shared; of the ranks that share a copy, one writes, and the others wait.
        No rank may use the parameters within the context for anything else. Not within `join()`.
        """
        self._join.check_outside("write_parameters()")
        self._gathers.finish_all()
        self._transport.barrier()
        try:
            yield self._transport.writes_parameters or not self._shared
        finally:
            self._transport.barrier()
            self._note_writing()

    @untraced
    @torch.no_grad()
    def sit_out(self) -> bool:
        """Without data, take part in the next outer step of the other ranks of the average group (`outer_optimizer`).

        What this rank has trained since the last outer step is brought in; then it has the parameters that all have in common, and may
        train on from there: what is left to do is one `average_every` steps later, as if it had taken the steps in between. Its
        gradients, and the state of its optimizers, stay as they are. Takes part in what the others save, too.

        Collective: every rank of the process group has to call it, where others of the average group take a step. Optimizers have to
        be stepped in the order in which the model was wrapped with them.

        Returns:
            Whether others have trained meanwhile. Where nobody did, all have brought in what they had.

        Raises:
            NotSupportedError: there is no outer optimizer.
            CollectiveError: other ranks do not go together, or are gone.
        """
        return sit_out([one.ready_outer_steps("sit_out()") for one in self._optimizers])

    def leave(self) -> None:
        """This rank has run out of data for good: sit out outer steps until all other ranks of the average group have left, too.

        Then all of them have the same parameters. Collective, and raises, as `sit_out`.
        """
        while self.sit_out():
            pass

    @contextmanager
    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Iterator[None]:
        """Train within it when ranks have different numbers of batches: `with model.join(): for x in data: ...`.

        As `DistributedDataParallel.join`, and it covers the optimizer: a rank whose loop has ended stays in the context's
        exit, and there takes part in what the others do, without data: their backward passes, `clip_grad_norm_`, and their
        steps, in which it goes on stepping its shard with the options (learning rates, …) of the first rank that still
        trains. In the end all ranks have the same parameters, and those that left early have the options of the last
        steps; with `broadcast_buffers` all have the buffers of the first of the ranks that trained longest.

        Collective: every rank of the process group has to enter it, with the same arguments, also one that has no batch
        at all. Ranks that have data must do the same in the same order. Each forward (with buffers), backward, clipping
        and step in it costs one small exchange more.

        What is not repeated on a rank that has left: what the loop itself does on every rank (schedulers: bring their state
        over with `load_state_dict`; in-place changes of parameters), and collectives of the loop's or the model's own
        (`SyncBatchNorm`): those need `throw_on_early_termination`. Hooks of the optimizer's step do run there. Gradients of
        a backward under `no_sync()` that no later one has taken along are dropped when a rank leaves. Clear gradients by
        `zero_grad` of the optimizer or of this model.

        Args:
            divide_by_initial_world_size: divide gradients by the number of all ranks, so that every sample counts the same;
                False divides by the number of ranks that still train.
            enable: False when ranks are known to have the same number of batches: nothing is exchanged, but on entering.
            throw_on_early_termination: when one rank leaves, all raise at their next forward or backward, before anything
                of it has been exchanged. Training may go on after the context.

        Raises:
            StateError: within `join()` of this or another model; or, with `throw_on_early_termination`, on all ranks when
                one has run out of data.
            RankMismatchError: ranks passed different arguments; on all ranks.
            CollectiveError: ranks with data do different things; on all ranks.
        """
        for optimizer in self._optimizers:
            optimizer.check_can_join()
        calls: JoinCalls = {
            Phase.FORWARD: self._take_over_buffers,
            Phase.BACKWARD: self._reducer.mirror_backward,
            Phase.LEAVE: self._take_over_buffers,
            Phase.CLIP: lambda number, *args: self._optimizers[number].clip_grad_norm_(*args),
            Phase.STEP: lambda number, *args: self._optimizers[number].step_along(*args),
            Phase.ZERO_GRAD: self._zero_grad_along,
            Phase.UNSCALE: self._unscale_along,
            Phase.OVERFLOW: lambda number, found: self._optimizers[number].agree_on_overflow(found),
        }
        with self._join.context(
            calls,
            drain=self._reducer.finish_started,
            leave=self._reducer.drop_local,
            switched=self._features.follow_join,
            divide_by_initial_world_size=divide_by_initial_world_size,
            enable=enable,
            throw_on_early_termination=throw_on_early_termination,
        ):
            yield

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, the reduced ones too, as the optimizer's `zero_grad` does."""
        if set_to_none:
            self._reducer.discard()
        else:
            self._reducer.zero()
        self.module.zero_grad(set_to_none)
        if self._join.is_on:
            self._join.note(Phase.ZERO_GRAD, None, set_to_none)

    def _unscale_along(self, indices: Sequence[int], inverse: float) -> None:
        """Look at gradients, and multiply them, as a GradScaler does on the ranks that still train. Collective."""
        view = self._reducer.view
        assert isinstance(view, ShardedView)  # of others, a GradScaler asks nothing
        view.check_and_unscale(indices, torch.zeros((), device="cpu"), torch.tensor(inverse, device="cpu"))

    def _zero_grad_along(self, number: int | None, set_to_none: bool) -> None:
        (self if number is None else self._optimizers[number]).zero_grad(set_to_none)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> None:
        """Asked for by DistributedDataParallel, when it is put around this model: raises ConfigError. Whoever else goes through all
        attributes finds none of that name."""
        if is_of_ddp(sys._getframe(1)):
            refuse_ddp_around()
        raise AttributeError("_ddp_params_and_buffers_to_ignore")

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """Raises NotSupportedError: DistributedDataParallel has such hooks, mostly to send gradients in 16 bits."""
        raise NotSupportedError(
            "zeroopt has no communication hooks. To send gradients in 16 bits, as fp16_compress_hook and bf16_compress_hook do, "
            "pass reduce_dtype=torch.float16 or torch.bfloat16 to zeroopt.wrap (stages 1 and 2); to average parameters every k "
            "steps, as PostLocalSGD does, pass average_every=k"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """`module.state_dict()`. Not collective: every rank holds all parameters."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`module.load_state_dict()`, which copies the values into zeroopt's storage. What 16-bit parameters cannot hold of float32
        values goes into their masters or remainders.

        Collective where parameters are shared: one rank of each host writes them, once, and every rank loads its buffers.
        Not within `join()`.

        Raises:
            ConfigError: `assign=True`, which would put the parameters elsewhere.
        """
        self._join.check_outside("load_state_dict()")
        if assign:
            raise ConfigError("load_state_dict(assign=True) would take the parameters out of zeroopt's storage")
        rounded = copy.copy(state_dict)  # with its metadata
        cast(dict[str, Any], rounded).update(self._round_exact(state_dict))
        if not self._shared:
            result = self.module.load_state_dict(rounded, strict=strict)
            self._note_writing()
        else:
            with self.write_parameters() as mine, nullcontext() if mine else self._gathers.read_only():
                result = self.module.load_state_dict(rounded, strict=strict)
        self._complete_exact(state_dict)
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """`load_state_dict` of a larger module that this one is in asks for it, and then loads the children. Collective where
        parameters are shared: every rank of a host then writes the same values to the same memory."""
        self._join.check_outside("load_state_dict()")
        if local_metadata.get("assign_to_params_buffers", False):
            raise ConfigError("load_state_dict(assign=True) would take the parameters out of zeroopt's storage")
        self._gathers.finish_all()
        if self._shared:
            self._transport.barrier()  # nobody reads them any more
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        state_dict.update({prefix + name: value for name, value in self._round_exact(own).items()})
        self._complete_exact(own)
        self.module._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _round_exact(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those float32 values whose parameters are completed by masters, rounded as the step rounds them."""
        return {name: bucket.master.round(value) for name, bucket, _, value in self._exact_values(state_dict)}

    def _complete_exact(self, state_dict: Mapping[str, Any]) -> None:
        """Let this rank's masters and remainders be those of float32 values that have been loaded."""
        segments = {segment.owner: segment for bucket in self._replica.buckets for segment in bucket.segments}
        for _, bucket, managed, value in self._exact_values(state_dict):
            segment = segments.get(managed)
            if segment is not None:
                flat = managed.flatten(value.to(bucket.device))
                bucket.master.write(*segment.range, flat[segment.start : segment.start + segment.numel])

    def _exact_values(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Bucket, ManagedParam, Tensor]]:
        """The float32 values in a state dict of parameters that masters complete, by the names that they have there: those of
        `named_parameters`, or what hooks have made of these in the module's own state dict."""
        completed = {
            managed.param: (bucket, managed)
            for bucket in self._replica.buckets
            if bucket.master.completes
            for managed in bucket.params
        }
        if not completed:
            return
        named = dict(self.module.named_parameters(remove_duplicate=False))
        for name, param in {**named, **self.module.state_dict(keep_vars=True)}.items():
            owner = param if isinstance(param, nn.Parameter) else named.get(name)  # a hook may have made a copy
            value = state_dict.get(name)
            if owner is not None and owner in completed:
                bucket, managed = completed[owner]
                if _is_exact(value, managed):
                    yield name, bucket, managed, value

    def _note_writing(self) -> None:
        for optimizer in self._optimizers:
            optimizer.take_up_writes()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`module.compile()`: what comes before a forward is not part of the code."""
        self.module.compile(*args, **kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """`module.named_parameters()`."""
        return self.module.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """`module.named_buffers()`."""
        return self.module.named_buffers(prefix, recurse, remove_duplicate)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """This module, and `module.named_modules()`, of which the first has the same name."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self.module.named_modules(memo, prefix, remove_duplicate)

    def train(self, mode: bool = True) -> Self:
        """`module.train()`."""
        self.training = mode
        self.module.train(mode)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """`module.apply()`, and the function of this module last."""
        self.module.apply(fn)
        fn(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A deep copy of the model in `.module`, with the current parameters. Not collective."""
        return remove_idle_hooks(copy.deepcopy(self.module, memo))

    def __getstate__(self) -> dict[str, Any]:
        raise NotSupportedError(
            "a ZeroDataParallel cannot be pickled or copied with copy.copy; save the model in .module or its state_dict(), "
            "or use copy.deepcopy, which copies the model in .module"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in vars(self):  # not set yet
                raise
            return getattr(self.module, name)


def _is_exact(value: Any, managed: ManagedParam) -> TypeGuard[Tensor]:
    """Whether a value is more exact than a 16-bit parameter. Of DTensors, other ranks may have the values."""
    return (
        isinstance(value, Tensor)
        and value.dtype is torch.float32
        and value.shape == managed.shape
        and not managed.flat_layout.is_part
    )
