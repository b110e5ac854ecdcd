"""Waits that signals end.

Python handles a signal in its main thread, when that comes back to the interpreter, and a wait of the backend's does not come back before
the message has come or the group's timeout has gone by. So there another thread waits for the backend, and the main thread for that one,
which it does in Python's own way: Ctrl-C raises at once, and the handler of any other signal runs at once, after which waiting goes on.
"""

from __future__ import annotations

import os
import threading
from _thread import allocate_lock
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")

# A signal that comes just before the main thread goes to sleep does not wake it up.
_LOOK_S = 0.1

_idle: list[_Helper] = []
os.register_at_fork(after_in_child=_idle.clear)  # a child has their objects, and not their threads


def wait_patiently(wait: Callable[[], T]) -> T:
    """What a call returns, or raises, that blocks in the backend. Signals that come meanwhile are handled; where a handler raises, the
    call goes on in another thread."""
    if threading.current_thread() is not threading.main_thread():
        return wait()
    helper = _idle.pop() if _idle else _Helper()
    result = helper.run(wait)
    _idle.append(helper)
    if isinstance(result, _Raised):
        raise result.error
    return cast(T, result)


class _Raised:
    """What a call has raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Helper:
    """A thread that makes one call at a time. One whose caller a signal has called away is not used again."""

    def __init__(self) -> None:
        self._begin, self._over = allocate_lock(), allocate_lock()
        self._begin.acquire()
        self._over.acquire()
        self._call: Callable[[], object] | None = None
        self._result: Any = None
        threading.Thread(target=self._serve, name="zeroopt waiting", daemon=True).start()

    def run(self, call: Callable[[], object]) -> Any:
        """What the call returns, or `_Raised`."""
        self._call = call
        self._begin.release()
        while not self._over.acquire(timeout=_LOOK_S):
            pass
        result, self._result = self._result, None
        return result

    def _serve(self) -> None:
        while True:
            self._begin.acquire()
            assert self._call is not None
            try:
                self._result = self._call()
            except BaseException as error:  # noqa: BLE001  told to whoever waits
                self._result = _Raised(error)
            self._call = None  # and what it keeps
            self._over.release()
