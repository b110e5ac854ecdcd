"""Keeping torch.compile out of zeroopt's own code.

A compiled function may hold a whole training step: `backward()`, clipping, `optimizer.step()`. What zeroopt does there (buffers that
transports know by their address, collectives, threads) cannot be traced, and the hooks that autograd calls would be, one by
one. Compiled code is left at such a function and entered again behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch._C._dynamo import eval_frame
from torch._compile import _disable_dynamo

_P = ParamSpec("_P")
_R = TypeVar("_R")


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have torch.compile run a function, and all that it calls, as it stands.

    `torch.compiler.disable` would import the compiler, which takes seconds, together with zeroopt. This imports it with the
    first call, before which torch's optimizers have done so.
    """
    return cast(Callable[_P, _R], _disable_dynamo(function))


def untraced_frame(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have torch.compile run a function as it stands, at no cost a call, and compile what it calls.

    That is where it is called as it stands itself. In the middle of what is being compiled it is traced like any other.
    """
    if hasattr(eval_frame, "set_code_exec_strategy"):
        strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    else:  # torch before 2.7
        eval_frame.skip_code(function.__code__)  # type: ignore[attr-defined]
    return function


def untraced_hook(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same, at no cost a call, for what autograd calls: compiled code must not call the function itself.

    Torch 2.7 and later let the interpreter know by the function's code what is not to be traced, so there is nothing around it.
    """
    if not hasattr(eval_frame, "set_code_exec_strategy"):
        return untraced(function)
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have compiled functions that a function calls run as they were written, in torch 2.6 and later: for trials, whose tensors never
    come again. Of a function that is first called under a dispatch mode, the compiler would give up the code for good.
    """
    if not hasattr(torch.compiler, "set_stance"):
        return untraced(function)

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return untraced(run)


def is_compiled_backward() -> bool:
    """Whether this is called in a backward that compiled autograd runs."""
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiled_autograd is not None and bool(getattr(compiled_autograd, "in_compiled_autograd_region", False))
