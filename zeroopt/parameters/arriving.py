"""Parameters that are on their way, and who waits for them: the guard that lets nobody read them too early.

Whoever uses a parameter first after a step waits for its bucket: mostly the forward of the module that owns it, and otherwise any
other use in Python (evaluation, `state_dict`, an average of the weights, printing), through whatever reference. While its
bucket is on its way, a parameter is an instance of a subclass of `nn.Parameter` whose `__torch_function__` waits; then it is a
plain `nn.Parameter` again. It stays the same object.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from ..collectives import PendingCollective
from ..untraced import untraced_frame, untraced_hook
from .compiled import callees_compiler, is_made_by_compiler


class Gathers(Protocol):
    """Who knows what is on its way, for as long as there is a wrapped model or an optimizer.

    Attributes:
        pending: the buckets that nobody has waited for, by index.
        arrived: those for which a stream of a device has waited, and others may still have to.
    """

    @property
    def pending(self) -> Collection[int]: ...

    @property
    def arrived(self) -> Collection[int]: ...

    def finish(self, bucket: int) -> None:
        """Wait until a bucket's parameters are all there, and let them be plain again."""


class Arrival:
    """A bucket on its way, as its parameters know it. Each of them keeps it, for they may be used when the wrapped model and its
    optimizer are gone; it keeps none of them, nor what they belong to.

    Args:
        pending, params: what to wait for, and which they are, where there are no gathers any more.
    """

    def __init__(
        self, gathers: Gathers, bucket: int, pending: PendingCollective, params: Sequence[TensorWeakRef]
    ) -> None:
        self._gathers = weakref.ref(gathers)
        self._bucket = bucket
        self._pending: PendingCollective | None = pending
        self._params = params
        self._turn = Lock()  # of threads that wait where there are no gathers

    def finish(self) -> None:
        """Wait until the bucket's parameters are all there, and let them be plain again."""
        gathers = self._gathers()
        if gathers is not None:
            gathers.finish(self._bucket)
            return
        with self._turn:
            if self._pending is not None:
                self._pending.finish()
                self._pending = None
                let_be_plain(param for reference in self._params if (param := reference()) is not None)


def _accessors(*names: str) -> Iterator[Any]:
    """How `__torch_function__` is told of reading, setting and deleting attributes of a tensor."""
    for name in names:
        attribute: Any = getattr(Tensor, name)
        yield from (attribute.__get__, attribute.__set__, attribute.__delete__)


# What does not look at a parameter's values, and is called between a step and the next forward (zero_grad above all).
_METADATA = {
    *_accessors("grad", "requires_grad", "shape", "dtype", "device", "layout", "is_leaf", "ndim", "grad_fn"),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.requires_grad_),
}


class ArrivingParameter(nn.Parameter):
    """A parameter whose bucket is on its way. Each bucket has a subclass of its own.

    Attributes:
        arrival: what to wait for.
        latest: the same by the class, which must not keep it: a class is freed by Python's collector only.
    """

    arrival: Arrival
    latest: ClassVar[weakref.ref[Arrival]]

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        return nn.Parameter(data, requires_grad)  # copy.deepcopy makes one of the class that it has found

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        arrival = cls.latest()
        if arrival is not None:  # else another thread has waited, for there is no parameter that keeps it
            arrival.finish()  # after which the bucket's parameters have their own class again
        return function(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        arrival = type(self).latest()
        if arrival is not None:
            arrival.finish()  # before it is looked for what a parameter has besides its values
        return self.__reduce_ex__(protocol)


def arriving_class() -> type[ArrivingParameter]:
    """One for the parameters of a bucket while they are on their way."""
    return type("ArrivingParameter", (ArrivingParameter,), {})


def let_arrive(params: Iterable[nn.Parameter], cls: type[ArrivingParameter], arrival: Arrival) -> None:
    """Have the parameters of a bucket, which has that class, wait when they are used."""
    cls.latest = weakref.ref(arrival)
    for param in params:
        param.__class__ = cls
        param.arrival = arrival  # type: ignore[attr-defined]


def let_be_plain(params: Iterable[nn.Parameter]) -> None:
    """They are there."""
    for param in params:
        param.__class__ = nn.Parameter
        del param.arrival  # type: ignore[attr-defined]


class _ReadOnly(Tensor):
    """A parameter whose values another rank loads."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.copy_ and isinstance(args[0], cls):
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


@cache
def _read_only_class(cls: type[Tensor]) -> type[Tensor]:
    return type(f"ReadOnly{cls.__name__}", (_ReadOnly, cls), {"__slots__": ()})


@contextmanager
def read_only(params: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it, `copy_` into a parameter does nothing: another rank writes the memory that they share."""
    classes = [param.__class__ for param in params]
    for param in params:
        param.__class__ = _read_only_class(param.__class__)  # type: ignore[assignment]
    try:
        yield
    finally:
        for param, cls in zip(params, classes, strict=True):
            param.__class__ = cls


HookPlace = tuple["OrderedDict[int, Any]", int, "ForwardHook"]
"""The hooks of a module, the key among them of one of ours, and that."""


def put_on(places: Sequence[HookPlace]) -> None:
    """Let forwards wait again, before hooks of the user's, which may read parameters."""
    for hooks, key, hook in places:
        hooks[key] = hook
        if len(hooks) > 1:
            hooks.move_to_end(key, last=False)


def take_off(places: Sequence[HookPlace]) -> None:
    """Let them wait for nothing."""
    for hooks, key, _ in places:
        hooks.pop(key, None)


class ForwardHook:
    """Waits for the buckets of a module's parameters before its forward: some modules hand their own to compiled code, past
    `__torch_function__`, and where the forward itself is compiled, that goes for those of all modules below.

    Attributes:
        own: where the module's own parameters are, by index of the bucket.
        below: where its own and those of all modules below are.
    """

    def __init__(self, gathers: weakref.ref[Gathers], module: nn.Module) -> None:
        self._gathers = gathers
        self._handle = module.register_forward_pre_hook(self)
        self.own: list[int] = []
        self.below: list[int] = []

    def take_off(self) -> None:
        """Let the module's forward wait for nothing."""
        self._handle.remove()

    @property
    def place(self) -> HookPlace:
        """Where it is while the module's forward waits."""
        hooks = self._handle.hooks_dict_ref()
        assert hooks is not None  # its module's, which is there
        return hooks, self._handle.id, self

    @untraced_frame
    def __call__(self, module: nn.Module, args: Any) -> None:
        """Compiled code that contains it has been waited for. Calls nothing that torch.compile would take for the user's."""
        if torch.compiler.is_compiling():
            return
        gathers = self._gathers()
        if gathers is None or not (gathers.pending or gathers.arrived):
            return
        is_compiled = callees_compiler() is not None or is_made_by_compiler(module.forward)
        for bucket in self.below if is_compiled else self.own:
            if bucket in gathers.pending or bucket in gathers.arrived:
                gathers.finish(bucket)

    @untraced_hook
    def finish_below(self) -> None:
        """Wait for the parameters of the module, and of all below."""
        gathers = self._gathers()
        if gathers is None:
            return
        for bucket in self.below:
            if bucket in gathers.pending or bucket in gathers.arrived:
                gathers.finish(bucket)

    def __reduce__(self) -> tuple[Any, ...]:
        return take_idle_hook, ()  # a copy of the model has parameters of its own


def take_idle_hook() -> Callable[[nn.Module, Any], None]:
    """What copies of our hooks are, until `remove_idle_hooks`."""
    return _idle_hook


def _idle_hook(module: nn.Module, args: Any) -> None:
    """The hook of a copied model."""


def remove_idle_hooks(model: nn.Module) -> nn.Module:
    """Take the hooks that wait for nothing out of a copied model, and return the model."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _idle_hook]:
            del module._forward_pre_hooks[key]
    return model
