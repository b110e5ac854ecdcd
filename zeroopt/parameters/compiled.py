"""What of a model torch.compile has made into code of its own, and who comes before that code is entered.

Such code looks, before it runs, at the class of every parameter that it reads (a guard), and is made anew where that has become
another. So parameters that are on their way, which have a class of their own, must have arrived in front of compiled code: whoever
waits there does it outside of the code, which stays in one piece and knows nothing of it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.torch_version import TorchVersion

from ..untraced import untraced_frame

# What a callable has that torch.compile has made.
_MARK = "_torchdynamo_orig_callable"


def has_compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.utils.counters["stats"].get("unique_graphs"))


def runs_compiled(module: nn.Module) -> bool:
    """Whether some part of the model runs without Python's seeing which modules it goes through."""
    compiled: tuple[type, ...] = (torch.jit.ScriptModule,)
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and 70 MB
        compiled += (torch._dynamo.OptimizedModule,)
    return any(isinstance(part, compiled) or part._compiled_call_impl is not None for part in module.modules())


def is_scripted(module: nn.Module) -> bool:
    """Whether some part of the model runs without Python's seeing its parameters, and without guards."""
    return any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())


def is_made_by_compiler(function: Any) -> bool:
    """Whether calling it enters compiled code."""
    return hasattr(function, _MARK)


# Whether frames that are called from here are compiled: None where they are not. Releases before 2.6 do not tell; 2.6 counts no reference
# for whom it tells, so that its own function is freed after some questions. Those before 2.9 have not been tried, and are not asked.
callees_compiler: Callable[[], Any] = (
    eval_frame.get_eval_frame_callback if TorchVersion(torch.__version__) >= "2.9" else lambda: has_compiled() or None
)


class CompiledCall:
    """Stands in a module for what `nn.Module.compile` has made of its call, and has something done before, outside of the code."""

    def __init__(self, compiled: Callable[..., Any], before: Callable[[], None]) -> None:
        self.compiled = compiled
        self._before = before

    @untraced_frame
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do it, and run the code. Where a larger piece of code is being made, the code becomes part of that."""
        if not torch.compiler.is_compiling():
            self._before()
        return self.compiled(*args, **kwargs)


def hook_compiled_calls(module: nn.Module, before: Callable[[], None]) -> None:
    """Have something done each time before the code of a module that was compiled in place. Does nothing where it was not."""
    compiled = module._compiled_call_impl
    if compiled is not None and not isinstance(compiled, CompiledCall):
        module._compiled_call_impl = CompiledCall(compiled, before)


def unhook_compiled_calls(module: nn.Module) -> None:
    """Undo `hook_compiled_calls`."""
    compiled = module._compiled_call_impl
    if isinstance(compiled, CompiledCall):
        module._compiled_call_impl = compiled.compiled


class Watcher(Protocol):
    """Who wants to know when code is compiled."""

    def compiler_starts(self, function: str, *, again: bool) -> None:
        """A function is about to be looked at.

        Args:
            function: a name that it keeps.
            again: there is code of it, which does not do for what is the case now.
        """


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


def watch_compiler(watcher: Watcher) -> None:
    """Tell somebody of it from now on, as long as he is there. `torch._dynamo.reset()` forgets that: call it again, at little cost."""
    _watchers.add(watcher)
    if "torch._dynamo" in sys.modules:
        handler = torch._dynamo.callback.callback_handler
        if _tell_watchers not in handler.start_callbacks:
            handler.register_start_callback(_tell_watchers)


def _tell_watchers(*args: Any) -> None:
    """Given what torch tells: a `CallbackArgs`, and before release 2.8 nothing."""
    if args and args[0].callback_trigger.name != "DYNAMO":
        return
    function, _, number = args[0].compile_id.rpartition("/") if args else ("", "", "")
    for watcher in list(_watchers):
        watcher.compiler_starts(function, again=number != "0")


def is_below_compiled_call() -> bool:
    """Whether this is called, directly or not, by code of a module's forward that `CompiledCall` or a hook has seen coming."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CompiledCall.__call__.__code__:
            return True
        if frame.f_code is nn.Module._call_impl.__code__ and is_made_by_compiler(frame.f_locals["self"].forward):
            return True
        frame = frame.f_back
    return False
