"""Updated parameters on their way from the ranks that stepped them, and the guard that lets nobody read them too early.

The step starts one all-gather a bucket and returns. Whoever then uses a parameter first waits for its bucket: mostly the
forward of the module that owns it, and otherwise any other use in Python (evaluation, `state_dict`, an average of the
weights, printing), through whatever reference. While its bucket is on its way, a parameter is an instance of a subclass of
`nn.Parameter` whose `__torch_function__` waits; then it is a plain `nn.Parameter` again. It stays the same object.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..collectives import PendingCollective, Transport
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..untraced import untraced


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
        gathers, bucket: what to wait for. `gathers` is None while no parameter is of this class.
    """

    gathers: ClassVar[ParamGathers | None] = None
    bucket: ClassVar[int]

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        return nn.Parameter(data, requires_grad)  # copy.deepcopy makes one of the class that it has found

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        assert cls.gathers is not None
        cls.gathers.finish(cls.bucket)  # after which the bucket's parameters have their own class again
        return function(*args, **(kwargs or {}))


def _arriving_class(bucket: int) -> type[ArrivingParameter]:
    return type("ArrivingParameter", (ArrivingParameter,), {"bucket": bucket})


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


class ParamGathers:
    """The all-gathers of one wrapped model's parameters.

    Attributes:
        pending: by index of the bucket, those that nobody has waited for.

    Args:
        lazy: let the first use of a parameter wait for it; else `leave_to_readers` waits for all.
    """

    def __init__(self, module: nn.Module, transport: Transport, *, lazy: bool) -> None:
        self._module = module
        self._transport = transport
        self._lazy = lazy and not _runs_compiled(module)
        self.pending: dict[int, PendingCollective] = {}
        self._hooks: list[_ForwardHook] = []
        self._handles: list[RemovableHandle] = []
        self._buckets: list[Bucket] = []

    def extend(self, buckets: Sequence[Bucket]) -> None:
        """Take up buckets of further parameters."""
        self.finish_all()
        if self._lazy:
            self._hook_forwards(buckets)
        self.attach([*self._buckets, *buckets])

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Go by these buckets, in which the same parameters lie, or some of them."""
        assert not self.pending
        self._buckets = list(buckets)
        self._params = [[managed.param for managed in bucket.params] for bucket in buckets]
        self._classes = [_arriving_class(bucket.index) for bucket in buckets]
        # A user's own class of parameters stays as it is. Methods of a DTensor get at its values past `__torch_function__`.
        self._markable = [all(type(param) is nn.Parameter for param in params) for params in self._params]
        bucket_of = {managed.param: bucket.index for bucket in buckets for managed in bucket.params}
        for hook in self._hooks:
            hook.params = [param for param in hook.params if param in bucket_of]
            hook.buckets = sorted({bucket_of[param] for param in hook.params})

    def start(self, bucket: Bucket, readers: PendingCollective | None = None) -> None:
        """Start to gather a bucket whose own slice has been updated. Collective, as `Transport.start_all_gather`.

        Args:
            readers: the rendezvous of the ranks that may still read their parameters, of which those of the bucket are about to
                be written; is waited for.
        """
        if readers is not None:
            readers.finish()
        with named_range("all_gather", bucket.name):
            self.pending[bucket.index] = self._transport.start_all_gather(bucket.flat_param, label=bucket.name)

    def leave_to_readers(self) -> None:
        """All gathers of this step have been started: whoever uses a parameter first waits for it."""
        self._transport.flush()
        lazy = self._lazy and not _has_compiled()
        for bucket in list(self.pending):
            if not (lazy and self._markable[bucket]):
                self.finish(bucket)
                continue
            # A strong reference: parameters may be used when the wrapped model and its optimizer are gone.
            self._classes[bucket].gathers = self
            for param in self._params[bucket]:
                param.__class__ = self._classes[bucket]

    @untraced
    def finish(self, bucket: int) -> None:
        """Wait until a bucket's parameters are all there."""
        pending = self.pending.get(bucket)
        if pending is None:
            return
        with named_range("wait_for_gather", self._buckets[bucket].name):
            pending.finish()
        del self.pending[bucket]
        if self._classes[bucket].gathers is not None:
            for param in self._params[bucket]:
                param.__class__ = nn.Parameter
            self._classes[bucket].gathers = None

    @untraced
    def finish_all(self) -> None:
        """Wait until all parameters are there."""
        for bucket in list(self.pending):
            self.finish(bucket)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Within it, `copy_` into a parameter does nothing: another rank writes the memory that they share."""
        params = [param for params in self._params for param in params]
        classes = [param.__class__ for param in params]
        for param in params:
            param.__class__ = _read_only_class(param.__class__)  # type: ignore[assignment]
        try:
            yield
        finally:
            for param, cls in zip(params, classes, strict=True):
                param.__class__ = cls

    def _hook_forwards(self, buckets: Sequence[Bucket]) -> None:
        """Some modules hand their parameters to compiled code, past `__torch_function__`."""
        managed = {managed.param for bucket in buckets for managed in bucket.params}
        for submodule in self._module.modules():
            own = [param for param in submodule.parameters(recurse=False) if param in managed]
            if own:
                hook = _ForwardHook(weakref.ref(self), own)
                self._hooks.append(hook)
                self._handles.append(submodule.register_forward_pre_hook(hook))

    def remove_hooks(self) -> None:
        """Let forwards wait for nothing any more. After `finish_all`."""
        for handle in self._handles:
            handle.remove()


class NoGathers(ParamGathers):
    """Where every rank steps all parameters: stage 0, and a rank alone."""

    def start(self, bucket: Bucket, readers: PendingCollective | None = None) -> None:
        """Nothing travels, and nobody's parameters are written."""


class _ForwardHook:
    """Waits for the buckets of a module's own parameters."""

    def __init__(self, gathers: weakref.ref[ParamGathers], params: list[nn.Parameter]) -> None:
        self._gathers = gathers
        self.params = params
        self.buckets: list[int] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        gathers = self._gathers()
        if gathers is None or not gathers.pending:
            return
        for bucket in self.buckets:
            if bucket in gathers.pending:
                gathers.finish(bucket)

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_idle_hook, ()  # a copy of the model has parameters of its own


def _take_idle_hook() -> Callable[[nn.Module, Any], None]:
    return _idle_hook


def _idle_hook(module: nn.Module, args: Any) -> None:
    """The hook of a copied model."""


def remove_idle_hooks(model: nn.Module) -> nn.Module:
    """Take the hooks that wait for nothing out of a copied model, and return the model."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _idle_hook]:
            del module._forward_pre_hooks[key]
    return model


def _has_compiled() -> bool:
    """Whether torch.compile has compiled anything: its code would be compiled again for each change of a parameter's class."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.utils.counters["stats"].get("unique_graphs"))


def _runs_compiled(module: nn.Module) -> bool:
    """Whether some part of the model runs without Python's seeing its parameters."""
    compiled: tuple[type, ...] = (torch.jit.ScriptModule,)
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and 70 MB
        compiled += (torch._dynamo.OptimizedModule,)
    return any(isinstance(part, compiled) or part._compiled_call_impl is not None for part in module.modules())
