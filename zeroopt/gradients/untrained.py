"""Gradients of parameters that no optimizer trains: averaged as DistributedDataParallel does, for who looks at all gradients.

`torch.nn.utils.clip_grad_norm_(model.parameters())` counts them, and has to find the same norm on every rank. Each rank keeps
their mean in `param.grad`, in every stage. They go by a few collectives of their own when a synchronised backward is through:
which of them any rank has used, and then those, side by side.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..collectives import ControlGroup, Transport
from ..plan.dtensors import describe_part, manage
from ..plan.params import ManagedParam
from ..untraced import untraced
from .hooks import is_taken_up

_WHAT = "averaging the gradients of parameters that no optimizer trains"  # for messages
_CHUNK_BYTES = 25 << 20  # of gradients that travel together


@untraced
def _on_gradient(untrained: weakref.ref[UntrainedGradients], index: int, param: Tensor) -> None:
    """The hook of one parameter. Autograd keeps it, so it must keep nothing alive."""
    owner = untrained()
    if owner is not None and not is_taken_up(param):  # by another wrapped model, which has the parameter in common
        owner.note(index)


class UntrainedGradients:
    """The gradients of those parameters of a wrapped model that require them and that none of its optimizers trains.

    Args:
        begin: a method that is called when the first of them comes in a backward.
    """

    def __init__(self, module: nn.Module, transport: Transport, begin: Callable[[], None]) -> None:
        self._module = module
        self._transport = transport
        self._begin = weakref.WeakMethod(begin)
        self._params: list[ManagedParam] = []
        self._came = bytearray()  # 1: on this rank since the last averaging
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._frozen: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._params)

    def fit(self, trained: Collection[Tensor]) -> None:
        """Take up the parameters that the model has besides the trained ones. Not collective, but all ranks call it alike.

        Where a rank is alone, nothing is averaged.
        """
        self.remove_hooks()
        came = {managed.param for managed, flag in zip(self._params, self._came, strict=True) if flag}
        self._params, self._frozen = [], []
        for name, param in self._module.named_parameters() if self._transport.control.size > 1 else ():
            if param in trained:
                continue
            if param.requires_grad:
                self._params.append(manage(name, param, len(self._params), -1, -1))
            else:
                self._frozen.append(param)
        self._came = bytearray(managed.param in came for managed in self._params)
        self._handles = [self._hook(managed) for managed in self._params]

    def remove_hooks(self) -> None:
        """Average nothing any more."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, managed: ManagedParam) -> torch.utils.hooks.RemovableHandle:
        hook = partial(_on_gradient, weakref.ref(self), managed.index)
        handle: torch.utils.hooks.RemovableHandle = managed.param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return handle

    def some_unfrozen(self) -> bool:
        """Whether parameters require gradients that did not when `fit` was called."""
        return any(param.requires_grad for param in self._frozen)

    def mark(self, params: Collection[Tensor]) -> None:
        """Gradients of these that there are, are of this rank alone."""
        for managed in self._params:
            self._came[managed.index] |= managed.param in params

    def note(self, index: int) -> None:
        """A gradient has come."""
        self._came[index] = 1
        begin = self._begin()
        if begin is not None:
            begin()

    def clear(self, *, all_of_them: bool) -> None:
        """Drop what this rank has in `param.grad`: of all, or of those that have come since the last averaging."""
        for managed, came in zip(self._params, self._came, strict=True):
            if came or all_of_them:
                managed.param.grad = None
        self._came = bytearray(len(self._params))

    @torch.no_grad()
    def average(self, scale: float) -> None:
        """Let those gradients that have come on any rank be `scale` times the sum over ranks. Collective.

        Raises:
            CollectiveError: a rank did not do its part.
        """
        control = self._transport.control
        flags = [
            came and managed.param.grad is not None for came, managed in zip(self._came, self._params, strict=True)
        ]
        self._came = bytearray(len(self._params))
        used = control.largest(torch.tensor(flags, dtype=torch.uint8, device=control.device), _WHAT)
        chosen = [managed for managed, flag in zip(self._params, used.tolist(), strict=True) if flag]
        for chunk in _chunks(chosen):
            _average_together(chunk, scale, control)


def untrained_params(module: nn.Module, trained: Collection[Tensor]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model that require gradients and are not trained, by name."""
    for name, param in module.named_parameters():
        if param.requires_grad and param not in trained:
            yield name, param


def describe_untrained(module: nn.Module, trained: Collection[Tensor]) -> list[str]:
    """What ranks have to have in common of them."""
    return [
        f"parameter {name!r} of shape {list(param.shape)}, {param.dtype}{describe_part(param)}, which no optimizer trains"
        for name, param in untrained_params(module, trained)
    ]


def _chunks(params: Sequence[ManagedParam]) -> Iterator[list[ManagedParam]]:
    """Parameters of one dtype and device side by side."""
    chunk: list[ManagedParam] = []
    num_bytes = 0
    for managed in sorted(params, key=lambda m: (str(m.local.dtype), str(m.local.device))):
        local = managed.local
        is_alike = chunk and (chunk[0].local.dtype, chunk[0].local.device) == (local.dtype, local.device)
        if chunk and not (is_alike and num_bytes + local.nbytes <= _CHUNK_BYTES):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(managed)
        num_bytes += local.nbytes
    if chunk:
        yield chunk


def _average_together(params: Sequence[ManagedParam], scale: float, control: ControlGroup) -> None:
    local = params[0].local
    flat = torch.zeros(sum(managed.numel for managed in params), dtype=local.dtype, device=local.device)
    pieces = [
        piece.view(managed.shape)
        for managed, piece in zip(params, torch.split(flat, [managed.numel for managed in params]), strict=True)
    ]
    for managed, piece in zip(params, pieces, strict=True):
        grad = managed.local_grad()
        if grad is not None:
            piece.copy_(grad).mul_(scale)
    control.total(torch.view_as_real(flat) if flat.is_complex() else flat, _WHAT)
    for managed, piece in zip(params, pieces, strict=True):
        grad = managed.local_grad()
        if grad is None:
            managed.set_local_grad(torch.empty_like(managed.local).copy_(piece))
        else:
            grad.copy_(piece)
