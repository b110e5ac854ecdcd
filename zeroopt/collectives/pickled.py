"""What ranks send each other pickled lies on the CPU.

A pickled CUDA tensor names the device that it was on. Whoever unpickles it would open a context on another rank's GPU, of some
hundred MB, and go on with a tensor that lies there.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor


def pickled(value: object, what: str) -> Tensor:
    """A value as bytes, uint8 on the CPU.

    Args:
        what: is going on, for messages.

    Raises:
        AssertionError: there is a tensor on another device in it.
    """
    check_on_cpu(value, what)
    return torch.frombuffer(bytearray(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def unpickled(message: Tensor) -> Any:
    """The value that such bytes stand for."""
    return pickle.loads(message.cpu().numpy().tobytes())


def check_on_cpu(value: object, what: str) -> None:
    """Look through all that pickle would, without the elements of tensors.

    Args:
        what: is going on, for messages.

    Raises:
        AssertionError: there is a tensor on another device. Whoever has called this has to move it first.
    """
    _Search(what).dump(value)


class _Search(pickle.Pickler):
    """Writes nowhere, and meets every tensor."""

    def __init__(self, what: str) -> None:
        super().__init__(_Nowhere(), pickle.HIGHEST_PROTOCOL)
        self._what = what

    def reducer_override(self, value: Any) -> Any:
        """Asked for everything but plain containers, numbers and strings; what it says stands in the place of the value."""
        if not isinstance(value, Tensor):
            return NotImplemented
        if not value.is_cpu:
            raise AssertionError(
                f"{self._what}: expected tensors on the CPU in what ranks send each other, got {value.dtype} of shape "
                f"{list(value.shape)} on {value.device}"
            )
        return int, ()


class _Nowhere:
    """A stream that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)
