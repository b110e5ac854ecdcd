"""Memory and kernels of a device, so that one comparison serves the CPU, CUDA sources on the CPU, and a GPU."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ALIGNMENT = 256  # bytes, as of torch's allocators


class Device(ABC):
    @abstractmethod
    def put(self, array: Array) -> int:
        """Copies an array into the device's memory. Its address, a multiple of ALIGNMENT."""

    @abstractmethod
    def get(self, address: int) -> Array:
        """What has become of an array."""

    @abstractmethod
    def run(self, kernel: str, *args: float | str) -> None:
        """Runs a kernel whose arguments say all: pack, pack_segments, quantize, dequantize, encode_slices or
        try_launch."""

    @abstractmethod
    def run_over_segments(self, kernel: str, *args: float | str, count: int, total_numel: int) -> None:
        """Runs the step of an optimizer or squared_norms."""

    @abstractmethod
    def run_over_slices(self, kernel: str, slices: list[int], *args: int) -> None:
        """Runs reduce or sum_encoded."""


class HostMemory(Device):
    def __init__(self) -> None:
        self._arrays: dict[int, Array] = {}

    def put(self, array: Array) -> int:
        memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        address = memory.ctypes.data + start
        self._arrays[address] = copy
        return address

    def get(self, address: int) -> Array:
        return self._arrays[address].copy()


class CpuDevice(HostMemory):
    """The CPU kernels of zeroopt._C."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self._module = module

    def run(self, kernel: str, *args: float | str) -> None:
        getattr(self._module, kernel)(*args, 2)

    def run_over_segments(self, kernel: str, *args: float | str, count: int, total_numel: int) -> None:
        getattr(self._module, kernel)(*args, 2)

    def run_over_slices(self, kernel: str, slices: list[int], *args: int) -> None:
        getattr(self._module, kernel)(slices, *args, 2)


def _signature(letters: str) -> list[Any]:
    """s: string, a: address or seed, i: int, u: uint32, l: int64, d: double, b: bool"""
    types = {
        "a": ctypes.c_uint64,
        "u": ctypes.c_uint32,
        "i": ctypes.c_int,
        "l": ctypes.c_int64,
        "d": ctypes.c_double,
        "b": ctypes.c_bool,
    }
    return [ctypes.c_char_p if letter == "s" else types[letter] for letter in letters]


SIGNATURES = {
    "step": "saaaaliiiaaaaalaa",
    "squared_norms": "aaalialaa",
    "quantize": "aaalba",
    "dequantize": "aaalba",
    "encode_slices": "aiaalliauua",
    "pack": "aiailda",
    "pack_segments": "aaliida",
    "reduce": "aliaaila",
    "sum_encoded": "aliaaila",
    "try_launch": "a",
}


class ShimError(AssertionError):
    """A kernel did on the CPU what a GPU would refuse."""


class ShimDevice(HostMemory):
    """The CUDA kernels, compiled by build.py."""

    def __init__(
        self, library: Path, num_multiprocessors: int = 1, reverse_order: bool = False, float64_ratio: int = 2
    ) -> None:
        super().__init__()
        self._library = ctypes.CDLL(str(library))
        self._library.last_error.restype = ctypes.c_char_p
        for name, letters in {"norm": "ll", "step": "sll"}.items():
            workspace_bytes = getattr(self._library, f"cuda_{name}_workspace_bytes")
            workspace_bytes.argtypes = _signature(letters)
            workspace_bytes.restype = ctypes.c_int64
        for name, letters in SIGNATURES.items():
            function = getattr(self._library, f"cuda_{name}")
            function.argtypes = _signature(letters)
            function.restype = ctypes.c_bool
        self._library.configure(num_multiprocessors, reverse_order, float64_ratio)

    def run(self, kernel: str, *args: float | str) -> None:
        plain = [arg.encode() if isinstance(arg, str) else arg for arg in args]
        if not getattr(self._library, f"cuda_{kernel}")(*plain, 0):
            raise ShimError(self._library.last_error().decode())

    def run_over_segments(self, kernel: str, *args: float | str, count: int, total_numel: int) -> None:
        num_bytes = self.workspace_bytes(str(args[0]) if kernel == "step" else None, count, total_numel)
        workspace = self.put(np.full(num_bytes + ALIGNMENT, 0xA5, np.uint8))  # whatever was there before
        self.run(kernel, *args, total_numel, workspace)
        assert (self.get(workspace)[num_bytes:] == 0xA5).all(), "wrote past the workspace"

    def workspace_bytes(self, step: str | None, count: int, total_numel: int) -> int:
        """Of the step of that name, or of squared_norms."""
        if step is None:
            return int(self._library.cuda_norm_workspace_bytes(count, total_numel))
        return int(self._library.cuda_step_workspace_bytes(step.encode(), count, total_numel))

    def run_over_slices(self, kernel: str, slices: list[int], *args: int) -> None:
        self.run(kernel, self.put(np.array(slices, np.int64)), len(slices), *args)
