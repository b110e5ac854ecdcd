"""Methods that are called back without keeping their object alive.

What refers to itself in a circle is freed only when Python's collector comes by, which may be long after the last use: a dropped model
would keep its memory, descriptors and threads until then. So references run one way, from whoever owns something to what he owns,
and what is owned calls back through these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def weak_method(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Call a method of an object that others keep alive. Raises ReferenceError when it is called and they do not any more."""
    reference = weakref.WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        bound = reference()
        if bound is None:
            raise ReferenceError(f"{method_name} was called, and its object is gone")
        return bound(*args, **kwargs)

    method_name = getattr(method, "__qualname__", "a method")
    return call


def weak_call(owner: object, name: str) -> Callable[..., Any]:
    """The same of what an object has by a name, which need not be a method of its own: a user may have made it a static one, or a partial
    one."""
    reference = weakref.ref(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        there = reference()
        if there is None:
            raise ReferenceError(f"{class_name}.{name} was called, and its object is gone")
        return getattr(there, name)(*args, **kwargs)

    class_name = type(owner).__qualname__
    return call
