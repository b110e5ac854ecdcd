"""The kernels of csrc/cuda on the pretend device: compiled for the CPU, and launched on its streams."""

from __future__ import annotations

import ctypes
import threading
from functools import partial
from typing import Any

import _device
import numpy as np
from cuda_on_cpu.build import build_kernels
from cuda_on_cpu.devices import ShimDevice
from numpy.typing import NDArray

from zeroopt.ops import encoded_bytes

Ranges = list[tuple[int, int, bool]]

DTYPE_BYTES = (4, 8, 2, 2)  # by the codes of csrc/common/dtype.h: float32, float64, bfloat16, float16
PARAM_BYTES = (4, 2, 2, 2, 2)  # by ParamFormat: of a parameter,
MASTER_BYTES = (0, 4, 4, 2, 0)  # and of what completes it
STATE_BYTES = (4, 2, 1)  # by StateFormat
ROW = (
    "numel",
    "group",
    "key",
    "first",
    "param",
    "master",
    "grad",
    *(f"state{i}" for i in range(3)),
    *(f"scales{i}" for i in range(3)),
)
QUANT_BLOCK = 256


def _reads(begin: int, num_bytes: int) -> Ranges:
    return [(begin, begin + num_bytes, False)] if begin else []


def _writes(begin: int, num_bytes: int) -> Ranges:
    return [(begin, begin + num_bytes, True)] if begin else []


def _array(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Memory at an address, a view."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class Table:
    """The rows of a table of segments as they are when a kernel is launched."""

    def __init__(self, address: int, active: int, count: int) -> None:
        self._memory = _array(address, (count, len(ROW)), np.int64)
        self._flags = _array(active, (count,), np.uint8) if active else np.ones(count, np.uint8)
        self._rows, self._active = self._memory.copy(), self._flags.copy()
        self.reads = _reads(address, self._memory.nbytes) + (_reads(active, count) if active else [])

    def is_unchanged(self) -> bool:
        """Whether it may be gone by: of another one, the addresses may be anything."""
        return np.array_equal(self._memory, self._rows) and np.array_equal(self._flags, self._active)

    def copies(self) -> tuple[int, int]:
        """Where there are copies of the rows and flags, as long as the table lives."""
        return self._rows.ctypes.data, self._active.ctypes.data

    def ranges(self, column: str, bytes_each: int, *, is_write: bool, block: int = 1) -> Ranges:
        """What the active rows have in a column."""
        if not bytes_each:
            return []
        found = []
        for row, on in zip(self._rows, self._active, strict=True):
            begin = int(row[ROW.index(column)])
            if on and begin:
                found.append((begin, begin + -(-int(row[0]) // block) * bytes_each, is_write))
        return found


class Kernels:
    """Stands for the functions `cuda_…` of zeroopt._C."""

    def __init__(self) -> None:
        self._shim = ShimDevice(build_kernels())
        self._lock = threading.Lock()  # its grid is one for all threads

    def install(self, module: Any) -> None:
        for name in (
            *("pack", "pack_segments", "reduce", "squared_norms", "step", "quantize", "dequantize"),
            *("encode_slices", "sum_encoded"),
        ):
            setattr(module, f"cuda_{name}", getattr(self, name))
        module.cuda_try_launch = lambda stream: self._launch("try_launch", [], (stream,))
        module.cuda_driver_version = self._shim._library.cuda_driver_version
        module.cuda_norm_workspace_bytes = partial(self._shim.workspace_bytes, None)
        module.cuda_step_workspace_bytes = self._shim.workspace_bytes
        facts = {**module.build_info(), "cuda": True, "cuda_version": "pretend", "cuda_archs": ["sm_90"]}
        module.build_info = lambda: facts

    def _launch(
        self, name: str, ranges: Ranges, args: tuple[Any, ...], table: Table | None = None, keep: Any = None
    ) -> None:
        """Args:
        table: that lies on the device, and is read when the kernel runs.
        keep: what has to live as long as the kernel may run.
        """
        device, stream = _device.current_device(), args[-1]

        def action(kept: Any = keep) -> bool:
            if table is not None and not table.is_unchanged():
                return False
            with self._lock:
                self._shim.run(name, *args[:-1])
            return True

        action()
        _device.add(
            _device.Kind.LAUNCH, _device.stream_actor(device, stream), device, f"zeroopt::{name}", ranges, [], action
        )

    def pack(self, *args: Any) -> None:
        src, src_code, dst, dst_code, numel, *_ = args
        ranges = _reads(src, numel * DTYPE_BYTES[src_code]) + _writes(dst, numel * DTYPE_BYTES[dst_code])
        self._launch("pack", ranges, args)

    def pack_segments(self, *args: Any) -> None:
        """The table lies on the host, and goes along with the launch."""
        rows, active, count, src_code, dst_code, *_ = args
        table = Table(rows, active, count)
        ranges = table.ranges("grad", DTYPE_BYTES[src_code], is_write=False)
        ranges += table.ranges("param", DTYPE_BYTES[dst_code], is_write=True)
        self._launch("pack_segments", ranges, (*table.copies(), *args[2:]), keep=table)

    def reduce(self, *args: Any) -> None:
        slices, slice_code, base, out, out_code, numel, stream = args
        addresses = np.array(slices, np.int64)
        ranges = [access for slice_ in slices for access in _reads(slice_, numel * DTYPE_BYTES[slice_code])]
        ranges += _reads(base, numel * DTYPE_BYTES[out_code]) + _writes(out, numel * DTYPE_BYTES[out_code])
        args = (addresses.ctypes.data, len(slices), slice_code, base, out, out_code, numel, stream)
        self._launch("reduce", ranges, args, keep=addresses)

    def squared_norms(self, *args: Any) -> None:
        rows, active, squares, count, grad_code, found_inf, _, workspace, _ = args
        table = Table(rows, active, count)
        ranges = table.reads + table.ranges("grad", DTYPE_BYTES[grad_code], is_write=False)
        ranges += _writes(squares, 16 * count) + _writes(found_inf, 4) + _writes(workspace, 1)
        self._launch("squared_norms", ranges, args, table)

    def step(self, *args: Any) -> None:
        _, rows, active, steps, squares, count, param, grad, state, groups, *scalars, _, _, workspace, _ = args
        table = Table(rows, active, count)
        ranges = table.reads + table.ranges("grad", DTYPE_BYTES[grad], is_write=False)
        ranges += table.ranges("param", PARAM_BYTES[param], is_write=True)
        ranges += table.ranges("master", MASTER_BYTES[param], is_write=True)
        for i in range(3):
            ranges += table.ranges(f"state{i}", STATE_BYTES[state], is_write=True)
            ranges += table.ranges(f"scales{i}", 4, is_write=True, block=QUANT_BLOCK)
        for scalar in scalars:
            ranges += _reads(scalar, 4)
        ranges += _reads(groups, 8) + _writes(steps, 8 * count) + _writes(squares, 16 * count) + _writes(workspace, 1)
        self._launch("step", ranges, args, table)

    def quantize(self, *args: Any) -> None:
        values, codes, scales, numel, *_ = args
        blocks = -(-numel // QUANT_BLOCK)
        self._launch("quantize", _reads(values, 4 * numel) + _writes(codes, numel) + _writes(scales, 4 * blocks), args)

    def dequantize(self, *args: Any) -> None:
        codes, scales, values, numel, *_ = args
        blocks = -(-numel // QUANT_BLOCK)
        self._launch("dequantize", _reads(codes, numel) + _reads(scales, 4 * blocks) + _writes(values, 4 * numel), args)

    def encode_slices(self, *args: Any) -> None:
        values, dtype_code, residual, encoded, slice_numel, num_slices, bits, *_ = args
        numel = slice_numel * num_slices
        ranges = _reads(values, numel * DTYPE_BYTES[dtype_code]) + _writes(residual, 2 * numel)
        ranges += _writes(encoded, num_slices * encoded_bytes(slice_numel, bits))
        self._launch("encode_slices", ranges, args)

    def sum_encoded(self, *args: Any) -> None:
        slices, bits, base, out, out_code, numel, stream = args
        addresses = np.array(slices, np.int64)
        ranges = [access for slice_ in slices for access in _reads(slice_, encoded_bytes(numel, bits))]
        ranges += _reads(base, numel * DTYPE_BYTES[out_code]) + _writes(out, numel * DTYPE_BYTES[out_code])
        args = (addresses.ctypes.data, len(slices), bits, base, out, out_code, numel, stream)
        self._launch("sum_encoded", ranges, args, keep=addresses)
