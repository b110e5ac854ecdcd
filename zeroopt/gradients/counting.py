"""Counting gradients that come: all that there is to the hook of nearly every parameter on a device.

There the gradients of a bucket wait until the last one has come. Of one that comes behind others of its bucket, on the stream on which
the last of those has come, nothing has to be looked at. The compiled module counts it without a call of Python between two of autograd's
own kernels (`csrc/counting_hook.cpp`); what is here does the same, and takes its place in a build that has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from .. import _C
from ..untraced import untraced_hook


class ArrivalsInPython:
    """What is counted of one backward: lists that belong to others, who may change them, or put others in their place.

    Attributes:
        arrived: by index of the parameter, 1: its gradient has come.
        order: indices, as gradients came.
        bucket_of: by index of the parameter, its bucket's.
        missing: by index of the bucket, how many of its gradients have not come.
        last: likewise, on which stream the last one has come that waits, by what `tell` tells. None: none waits.
        tell: tells the current stream.
        is_on: gradients are counted. If not, each is looked at.
    """

    arrived: bytearray
    order: list[int]
    bucket_of: list[int]
    missing: list[int]
    last: list[object | None]
    tell: Callable[[], object]
    is_on: bool = False

    def count(self, index: int) -> int | None:
        """Count a gradient. Returns how many of its bucket are missing then; None: it has to be looked at, and was not counted."""
        if not self.is_on or self.arrived[index]:
            return None
        last = self.last[self.bucket_of[index]]
        return self.note(index) if last is not None and last == self.tell() else None

    def note(self, index: int) -> int:
        """A gradient has come. Returns how many of its bucket are missing."""
        self.arrived[index] = 1
        self.order.append(index)
        bucket = self.bucket_of[index]
        self.missing[bucket] -= 1
        return self.missing[bucket]


class CountingHookInPython:
    """The hook of one parameter, which counts what only has to be counted, and has its subclass look at the rest.

    Attributes:
        arrivals: in which it counts.
        index: of its parameter.
    """

    __slots__ = ("arrivals", "index")

    arrivals: ArrivalsInPython
    index: int

    @untraced_hook
    def __call__(self, param: Tensor) -> None:
        is_alone = len(param._post_accumulate_grad_hooks) == 1
        missing = self.arrivals.count(self.index) if is_alone else None
        if missing is None:
            self.look(param)
        elif missing == 0:
            self.complete(self.arrivals.bucket_of[self.index])

    def look(self, param: Tensor) -> None:
        """A gradient has come that was not counted."""
        raise NotImplementedError

    def complete(self, bucket: int) -> None:
        """The last one of a bucket has been counted."""
        raise NotImplementedError


if TYPE_CHECKING:
    Arrivals = ArrivalsInPython
    CountingHook = CountingHookInPython
else:
    Arrivals = getattr(_C, "Arrivals", ArrivalsInPython)
    CountingHook = getattr(_C, "CountingHook", CountingHookInPython)
