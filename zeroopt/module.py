"""The model that `zeroopt.wrap` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .collectives import named_failures
from .errors import ConfigError, NotSupportedError
from .optimizer import ZeroOptimizer
from .sharding import Sharding


class ZeroDataParallel(nn.Module):
    """A model whose gradients are averaged over the ranks of a process group while backward runs.

    It is called and trained like the model in `.module`. Names are the model's own, without a prefix: `state_dict`,
    `load_state_dict`, `named_parameters` and `named_buffers` are those of `.module`, and so is every attribute that this
    class lacks.

    Made by `zeroopt.wrap`.
    """

    def __init__(self, sharding: Sharding) -> None:
        super().__init__()
        config, module = sharding.config, sharding.module
        self.module = module
        self._sharding = sharding
        self._reducer = sharding.reducer
        self._gathers = sharding.gathers
        self._transport = sharding.transport
        self._shared = config.share_parameters
        self._input_dtype = config.precision.param_dtype if config.cast_inputs else None
        has_buffers = next(module.buffers(), None) is not None
        self._broadcaster = sharding.broadcaster if config.broadcast_buffers and has_buffers else None
        self._optimizers: list[ZeroOptimizer] = []

    @property
    def sharding(self) -> Sharding:
        """What the model shares with its optimizers."""
        return self._sharding

    def train_with(self, optimizer: ZeroOptimizer) -> None:
        """Add an optimizer that trains parameters of the model."""
        self._optimizers.append(optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. With `broadcast_buffers` it is collective while gradients are enabled and synchronised: ranks
        first take over the buffers (batch norm statistics and the like) of rank 0. With `cast_inputs`, floating-point tensors
        among the arguments, in whatever containers, are cast to `param_dtype`. Parameters of an optimizer that were frozen and
        now require gradients are trained from here on."""
        if torch.is_grad_enabled():
            for optimizer in self._optimizers:
                optimizer.take_in_unfrozen()
            if self._broadcaster is not None and self._reducer.sync:
                with named_failures("forward, taking over the buffers of rank 0", self._transport.group):
                    self._broadcaster.broadcast(list(self.module.buffers()))
        if self._input_dtype is not None:
            args, kwargs = tree_map(self._cast_input, (args, kwargs))
        return self.module(*args, **kwargs)

    def _cast_input(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._input_dtype) if is_float else value

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within this context add to the local `param.grad` and communicate nothing.

        The next backward outside of it takes those gradients along. What counts is where `backward()` is called. Until
        then each rank holds full local gradients, in stages 1 and 2 too.
        """
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
        No rank may use the parameters within the context for anything else.
        """
        self._gathers.finish_all()
        self._transport.barrier()
        try:
            yield self._transport.writes_parameters or not self._shared
        finally:
            self._transport.barrier()
            self._note_writing()

    def join(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported yet: uneven numbers of batches a rank."""
        raise NotSupportedError("join() is not supported yet; give every rank the same number of batches")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, the reduced ones too, as the optimizer's `zero_grad` does."""
        if set_to_none:
            self._reducer.discard()
        else:
            self._reducer.zero()
        self.module.zero_grad(set_to_none)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """`module.state_dict()`. Not collective: every rank holds all parameters."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`module.load_state_dict()`, which copies the values into zeroopt's storage.

        Collective where parameters are shared: one rank of each host writes them, once, and every rank loads its buffers.

        Raises:
            ConfigError: `assign=True`, which would put the parameters elsewhere.
        """
        if assign:
            raise ConfigError("load_state_dict(assign=True) would take the parameters out of zeroopt's storage")
        if not self._shared:
            result = self.module.load_state_dict(state_dict, strict=strict)
            self._note_writing()
            return result
        with self.write_parameters() as mine, nullcontext() if mine else self._gathers.read_only():
            return self.module.load_state_dict(state_dict, strict=strict)

    def _note_writing(self) -> None:
        for optimizer in self._optimizers:
            optimizer.take_up_writes()

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

    def __getstate__(self) -> dict[str, Any]:
        raise NotSupportedError(
            "a ZeroDataParallel cannot be copied or pickled; copy or save the model in .module, or its state_dict()"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not set yet
                raise
            return getattr(self.module, name)
