"""The functions run on the meta device, where nothing is computed and nothing changes: which of them makes what?"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ConfigError
from .call import Call, Needed
from .functions import Init, in_order_of_construction, reset_parameters
from .saved import Saved, readings
from .unchanged import unchanged
from .unmade import Unmade, meta_attributes

# In-place operators that read nothing of the tensor that they write.
_OVERWRITING = frozenset(
    f"aten::{name}_" for name in ("zero", "fill", "copy", "normal", "uniform", "random", "bernoulli", "exponential")
)


@dataclass(eq=False, kw_only=True)
class FunctionCall(Call):
    """One function called with one module. What it discards, another module has made; see `_keep_first`."""

    function: Init
    module: nn.Module
    path: str

    def __call__(self, needed: Needed | None = None) -> None:
        """Call it."""
        with torch.no_grad():
            self.function(self.module)

    def __str__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{name} of module {self.path!r} ({type(self.module).__name__})"


def try_out(
    model: nn.Module, functions: Sequence[Init | Saved], unmade: Mapping[Tensor, Unmade], device: torch.device
) -> list[Call]:
    """Call each function with each module that has something on the meta device, and see what it writes; see what is read.
    Changes nothing: what is replaced is put back, and so are the states of random generators.

    Raises:
        ConfigError: a function fails, replaces a parameter, or writes what is not on the meta device; or something is left
            that none of them writes.
        CheckpointError: what was saved is not of this model.
    """
    paths = {module: path for path, module in model.named_modules()}
    attributes = [(module, path, *found) for module, path in paths.items() for found in meta_attributes(module)]
    calls: list[Call] = []
    with _as_before(model, device):
        for function in functions:
            if isinstance(function, Saved):
                calls += readings(function, model, unmade, is_all=len(functions) == 1)
                continue
            for module in in_order_of_construction(model, dict(unmade)):
                call = FunctionCall(function=function, module=module, path=paths[module])
                _watch(call, model, unmade)
                calls.append(call)
        replaced = {one.tensor for one in unmade.values() if _is_replaced(one)}
        _check_attributes(model, attributes)
    _keep_first(calls, unmade)
    _check_all_made(calls, unmade, replaced)
    return calls


def _is_replaced(one: Unmade) -> bool:
    """Whether its module has another buffer in its place."""
    return one.kind == "buffer" and one.module._buffers.get(one.name.rpartition(".")[2]) is not one.tensor


def _watch(call: FunctionCall, model: nn.Module, unmade: Mapping[Tensor, Unmade]) -> None:
    before = dict(call.module.named_parameters())
    watch = _Watch(call, model, unmade)
    try:
        with watch:
            call()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{call} fails on the meta device, on which zeroopt.wrap tries it before anything is changed: "
            f"{type(error).__name__}: {error}"
        ) from error
    for name, param in call.module.named_parameters():
        if before.get(name) is not param:
            raise ConfigError(
                f"{call} replaces parameter {name!r} by another object, which no optimizer would step; let it write into the "
                "parameter instead (copy_)"
            )


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which tensors of the model operators read and write. Views of them count as the tensors."""

    def __init__(self, call: FunctionCall, model: nn.Module, unmade: Mapping[Tensor, Unmade]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call
        self._unmade = {_memory(tensor): tensor for tensor in unmade}
        self._made = {
            _memory(tensor): name
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor not in unmade and type(tensor.data) is Tensor
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        makes_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if not makes_view:
            named = {argument.name: argument for argument in schema.arguments}
            given = [*zip(schema.arguments, args, strict=False), *((named[name], kwargs[name]) for name in kwargs)]
            for argument, value in given:
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(tensor, Tensor):
                        self._note(tensor, writes=writes, overwriting=schema.name in _OVERWRITING)
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor, *, writes: bool, overwriting: bool) -> None:
        memory = _memory(tensor)
        if writes and memory in self._made:
            raise ConfigError(
                f"{self._call} writes {self._made[memory]!r}, which is not on the meta device and has values already; put all "
                "that it writes on the meta device, or nothing"
            )
        if memory in self._unmade:
            of_model = self._unmade[memory]
            whole = writes and overwriting and tensor.numel() == of_model.numel()
            self._call.overwrites.setdefault(of_model, whole)
            if writes:
                self._call.written.add(of_model)


def _memory(tensor: Tensor) -> int:
    """What tensors in the same memory have in common."""
    address: int = tensor.untyped_storage()._cdata
    return address


@contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back what was replaced in modules within it, and the states of random generators."""
    python_state = random.getstate()
    try:
        with unchanged(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)


def _keep_first(calls: Sequence[Call], unmade: Mapping[Tensor, Unmade]) -> None:
    """A parameter that several modules hold keeps what the `reset_parameters` of the first makes. Constructors do so, where the
    later module lets go of its own parameter for that of the first; the later ones draw their random numbers all the same."""
    made: set[Tensor] = set()
    for call in calls:
        if not isinstance(call, FunctionCall) or call.function is not reset_parameters:
            continue
        own = set(call.module.parameters(recurse=False))
        call.discarded = call.written & own & made
        for tensor in call.discarded:
            del call.overwrites[tensor]
        call.written -= call.discarded
        made |= call.written & own


def _check_all_made(calls: Sequence[Call], unmade: Mapping[Tensor, Unmade], replaced: set[Tensor]) -> None:
    made = replaced.union(*(call.written for call in calls))
    left = [one for tensor, one in unmade.items() if tensor.numel() and tensor not in made]
    if left:
        more = f" (and {len(left) - 1} more: {', '.join(repr(one.name) for one in left[1:5])})" if len(left) > 1 else ""
        raise ConfigError(
            f"{left[0]} is on the meta device, and nothing gives it values{more}: pass "
            "zeroopt.wrap(..., init=function of a module), or several in a list, that writes it in place, give its module a "
            "reset_parameters() that does, or build that module outside of `with torch.device('meta')`"
        )


def _check_attributes(model: nn.Module, attributes: Sequence[tuple[nn.Module, str, str, Tensor]]) -> None:
    registered = {*model.parameters(), *model.buffers()}
    for module, path, name, tensor in attributes:
        if vars(module).get(name) is tensor and tensor not in registered:
            raise ConfigError(
                f"attribute {name!r} of module {path!r}, a {type(module).__name__}, is a tensor on the meta device that is "
                "neither a parameter nor a buffer, and nothing replaces it; register it as a buffer, or make it on a device"
            )
