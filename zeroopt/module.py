"""The model that `zeroopt.wrap` returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .broadcast import Broadcaster
from .collectives import Transport
from .errors import ConfigError, NotSupportedError
from .grad_hooks import GradientReducer
from .param_gather import ParamGathers, remove_idle_hooks


class ZeroDataParallel(nn.Module):
    """A model whose gradients are averaged over the ranks of a process group while backward runs.

    It is called and trained like the model in `.module`. Names are the model's own, without a prefix: `state_dict`,
    `load_state_dict`, `named_parameters` and `named_buffers` are those of `.module`, and so is every attribute that this
    class lacks.

    A deep copy is one of `.module`: a plain model with parameters of its own, which is what
    `torch.optim.swa_utils.AveragedModel(model)` wants. It cannot be pickled.

    Made by `zeroopt.wrap`.
    """

    def __init__(
        self,
        module: nn.Module,
        reducer: GradientReducer,
        gathers: ParamGathers,
        transport: Transport,
        broadcaster: Broadcaster | None,
        *,
        shared: bool,
    ) -> None:
        super().__init__()
        self.module = module
        self._reducer = reducer
        self._gathers = gathers
        self._transport = transport
        self._shared = shared
        self._broadcaster = broadcaster
        self._after_writing: Callable[[], None] | None = None

    def after_writing(self, function: Callable[[], None]) -> None:
        """Have a function called whenever parameters were written by something other than a step."""
        self._after_writing = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. With `broadcast_buffers` it is collective while gradients are enabled and synchronised: ranks
        first take over the buffers (batch norm statistics and the like) of rank 0."""
        if self._broadcaster is not None and torch.is_grad_enabled() and self._reducer.sync:
            self._broadcaster.broadcast(list(self.module.buffers()))
        return self.module(*args, **kwargs)

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
        if self._after_writing is not None:
            self._after_writing()

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
            if name == "module":  # not set yet
                raise
            return getattr(self.module, name)
