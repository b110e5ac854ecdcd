"""Script: runs every CPU kernel of a zeroopt._C that is loaded from its file, without torch, and prints digests as JSON.

    ZEROOPT_CPU_ISA=avx2 python kernel_digests.py path/to/_C.so

The result of a call must not depend on the thread count, so each is made with several and must give one digest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import pairwise, product
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from op_cases import OPS, rows

LENGTHS = [0, 1, 7, 15, 16, 17, 31, 33, 63, 65, 200, 1025, 300_007]
THREADS = [1, 2, 3, 5]
ITEM_BYTES = [4, 8, 2, 2]  # by dtype code
REDUCE_CODES = [(0, 0), (1, 1), (2, 2), (3, 3), (2, 0), (3, 0), (0, 2), (0, 3)]
GRADS = [0, 2, 3]
FEW_FORMATS = [(0, 0, 0), (3, 2, 2), (4, 3, 1)]  # parameter, gradient, state: see csrc/kernels.h
HYPERS = {op.name: op.hypers(1e-8) for op in OPS.values()}
Array = NDArray[Any]


def load_module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finite_values(code: int, numel: int, rng: np.random.Generator) -> Array:
    """Bytes of `numel` elements of a dtype: of all exponents for 16 bits, normal ones for the others."""
    if code < 2:
        return rng.standard_normal(numel).astype([np.float32, np.float64][code]).view(np.uint8)
    bits = rng.integers(0, 2**16, numel, dtype=np.uint16)
    exponent = [0x7F80, 0x7C00][code - 2]
    bits[(bits & exponent) == exponent] = 0  # sums of two NaN or of infinities are NaN of no certain bits
    return bits.view(np.uint8)


def digest(run: Callable[[int], list[Array]]) -> str:
    """The digest of what run(num_threads) returns, which must be one and the same for all thread counts."""
    results = {b"".join(array.tobytes() for array in run(threads)) for threads in THREADS}
    assert len(results) == 1, "the result depends on the thread count"
    return hashlib.sha256(results.pop()).hexdigest()


def pack_digest(module: ModuleType, src: int, dst: int, numel: int) -> str:
    values = finite_values(src, numel, np.random.default_rng(numel))

    def run(threads: int) -> list[Array]:
        out = np.zeros(numel * ITEM_BYTES[dst], np.uint8)
        module.pack(values.ctypes.data, src, out.ctypes.data, dst, numel, 0.3, threads)
        return [out]

    return digest(run)


def reduce_digest(module: ModuleType, src: int, dst: int, numel: int, num_slices: int) -> str:
    rng = np.random.default_rng(numel)
    slices = [finite_values(src, numel, rng) for _ in range(num_slices)]
    base = finite_values(dst, numel, rng)

    def run(threads: int) -> list[Array]:
        out = np.zeros(numel * ITEM_BYTES[dst], np.uint8)
        addresses = [piece.ctypes.data for piece in slices]
        module.reduce(addresses, src, base.ctypes.data, out.ctypes.data, dst, numel, threads)
        return [out]

    return digest(run)


def quantize_digest(module: ModuleType, numel: int, is_signed: bool) -> str:
    values = moment(numel, is_signed, np.random.default_rng(numel))
    values[300::1000] = np.inf
    values[301::1500] = np.nan

    def run(threads: int) -> list[Array]:
        codes, scales = np.zeros(numel, np.uint8), np.zeros(-(-numel // 256), np.float32)
        decoded = np.zeros(numel, np.float32)
        module.quantize(values.ctypes.data, codes.ctypes.data, scales.ctypes.data, numel, is_signed, threads)
        module.dequantize(codes.ctypes.data, scales.ctypes.data, decoded.ctypes.data, numel, is_signed, threads)
        return [codes, scales, decoded]

    return digest(run)


def wire_digest(module: ModuleType, dtype: int, bits: int, numel: int, num_slices: int) -> str:
    rng = np.random.default_rng(numel)
    values = finite_values(dtype, numel * num_slices, rng)
    if dtype == 0 and numel > 256:
        values.view(np.float32)[300] = np.inf
    before = finite_values(2, numel * num_slices, rng)
    size = module.encoded_bytes(numel, bits)

    def run(threads: int) -> list[Array]:
        residual, encoded = before.copy(), np.zeros(num_slices * size + 16, np.uint8)
        begin = encoded.ctypes.data + -encoded.ctypes.data % 16
        noise = (2**63 + 5, 3, 2**31 + 1)
        arguments = (values.ctypes.data, dtype, residual.ctypes.data, begin, numel, num_slices, bits, *noise)
        module.encode_slices(*arguments, threads)
        out = np.zeros(numel * ITEM_BYTES[dtype], np.uint8)
        slices = [begin + number * size for number in range(num_slices)]
        module.sum_encoded(slices, bits, 0, out.ctypes.data, dtype, numel, threads)
        first = begin - encoded.ctypes.data
        return [residual, encoded[first : first + num_slices * size], out]

    return digest(run)


def moment(numel: int, is_signed: bool, rng: np.random.Generator) -> Array:
    values = rng.standard_normal(numel).astype(np.float32)
    return values if is_signed else np.abs(values)


class Segments:
    """Arrays of segments, cut out of `numel` elements at random places, with gaps of one element between them."""

    def __init__(self, op: str, formats: tuple[int, int, int], numel: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        cuts = [0, *sorted(rng.integers(0, numel + 1, 5).tolist()), numel]
        ranges = [(a + 1, b) for a, b in pairwise(cuts) if a + 1 < b]
        param, grad, state = formats
        values = rng.standard_normal(numel).astype(np.float32)
        self.param = values if param == 0 else to_half(values, 3 if param == 2 else 2)
        self.master = rng.integers(0, 2**16, numel, dtype=np.uint16) if param == 3 else values.copy()
        self.grad = grads = rng.standard_normal(numel).astype(np.float32)
        if grad != 0:
            self.grad = to_half(grads, grad)
        self.states, self.scales = [], []
        for is_signed in OPS[op].signed:
            states, scales = self._state(moment(numel, is_signed, rng), state, rng)
            self.states.append(states)
            self.scales.append(scales)
        self.active = np.array([i != 2 for i in range(len(ranges))], np.uint8)
        self.steps = np.zeros((2, len(ranges)), dtype=np.float32)  # see common/step_count.h
        self.steps[0] = np.arange(len(ranges))
        self.squares = np.zeros((len(ranges), 2))
        has_master = param in (1, 2, 3)
        rows = [
            [
                end - begin,
                (i + seed) % len(HYPERS[op]),
                i,
                3 * i,
                address(self.param, begin),
                address(self.master, begin) if has_master else 0,
                address(self.grad, begin),
                *padded([address(array, begin) for array in self.states]),
                *padded([address(array, i * (numel // 256 + 1)) for array in self.scales if state == 2]),
            ]
            for i, (begin, end) in enumerate(ranges)
        ]
        self.rows = np.array(rows, np.int64).reshape(-1, 13)
        self._before = [array.copy() for array in self.written()]

    @staticmethod
    def _state(values: Array, state: int, rng: np.random.Generator) -> tuple[Array, Array]:
        if state != 2:
            return (values if state == 0 else to_half(values, 2)), np.empty(0, np.float32)
        scales = np.abs(rng.standard_normal(6 * (values.size // 256 + 1))).astype(np.float32)
        return rng.integers(0, 256, values.size, dtype=np.uint8), scales

    def written(self) -> list[Array]:
        return [self.param, self.master, *self.states, *self.scales, self.steps, self.squares]

    def begin_anew(self) -> None:
        """With the values that they were made with: drawing those takes longer than any kernel."""
        for array, values in zip(self.written(), self._before, strict=True):
            array[...] = values


def to_half(values: Array, code: int) -> Array:
    """Float32 values as the bits of bfloat16, cut off, or of float16."""
    return values.view(np.uint16)[1::2].copy() if code == 2 else values.astype(np.float16).view(np.uint16)


def address(array: Array, index: int) -> int:
    return int(array.ctypes.data) + index * array.itemsize


def padded(addresses: list[int]) -> list[int]:
    return addresses + [0] * (3 - len(addresses))


def step_digest(module: ModuleType, op: str, formats: tuple[int, int, int], numel: int) -> str:
    groups = np.array(rows(HYPERS[op]), np.float64)
    scalars = np.array([3.0, 0.7, 0.0], np.float32)  # grad_scale, clip_coef, found_inf
    segments = Segments(op, formats, numel, seed=numel + sum(formats))

    def run(threads: int) -> list[Array]:
        segments.begin_anew()
        for kernel in OPS[op].kernels or (op,):
            module.step(
                kernel,
                segments.rows.ctypes.data,
                segments.active.ctypes.data,
                segments.steps.ctypes.data,
                segments.squares.ctypes.data,
                len(segments.rows),
                *formats,
                groups.ctypes.data,
                *(address(scalars, i) for i in range(3)),
                2**63 + 12345,
                threads,
            )
        return segments.written()

    return digest(run)


def norm_digest(module: ModuleType, grad: int, numel: int) -> str:
    segments = Segments("sgd", (0, grad, 0), numel, seed=numel)

    def run(threads: int) -> list[Array]:
        segments.begin_anew()
        found_inf = np.zeros(1, np.float32)
        module.squared_norms(
            segments.rows.ctypes.data,
            segments.active.ctypes.data,
            segments.squares.ctypes.data,
            len(segments.rows),
            grad,
            found_inf.ctypes.data,
            threads,
        )
        return [segments.squares, found_inf]

    return digest(run)


def parts_digest(module: ModuleType, squared: bool, numel: int) -> str:
    values = np.random.default_rng(numel).uniform(-1, 1, numel).astype(np.float32)
    rounders = [1.5 * 2.0 ** (52 - k * 20) for k in (1, 2, 3)]

    def run(threads: int) -> list[Array]:
        sums = np.full(3, np.nan)
        module.sum_in_parts(values.ctypes.data, numel, 0.5, squared, rounders, sums.ctypes.data, threads)
        return [sums]

    return digest(run)


def copy_digest(module: ModuleType, numel: int) -> str:
    values = np.random.default_rng(numel).integers(0, 256, 9 * numel, dtype=np.uint8)

    def run(threads: int) -> list[Array]:
        out = np.zeros_like(values)
        module.copy(values.ctypes.data, out.ctypes.data, values.size, threads)
        return [out]

    return digest(run)


def all_digests(module: ModuleType) -> dict[str, str]:
    digests = {}
    for numel in LENGTHS:
        for src in range(4):
            for dst in range(4):
                digests[f"pack {src} {dst} {numel}"] = pack_digest(module, src, dst, numel)
        for src, dst in REDUCE_CODES:
            for num_slices in (1, 2, 3, 4, 8, 13):
                digests[f"reduce {num_slices} x {src} {dst} {numel}"] = reduce_digest(
                    module, src, dst, numel, num_slices
                )
        digests[f"copy {numel}"] = copy_digest(module, numel)
        for flag in (False, True):
            digests[f"quantize {flag} {numel}"] = quantize_digest(module, numel, is_signed=flag)
            digests[f"sum_in_parts {flag} {numel}"] = parts_digest(module, squared=flag, numel=numel)
        for grad in GRADS:
            digests[f"squared_norms {grad} {numel}"] = norm_digest(module, grad, numel)
            for bits in (4, 8):
                digests[f"wire code {grad} {bits} {numel}"] = wire_digest(module, grad, bits, numel, 3)
    for op in OPS:
        for formats in product(range(5), GRADS, range(3)):
            digests[f"{op} {formats}"] = step_digest(module, op, formats, 1500)
        for formats in FEW_FORMATS:
            for numel in LENGTHS:
                digests[f"{op} {formats} {numel}"] = step_digest(module, op, formats, numel)
    return digests


if __name__ == "__main__":
    loaded = load_module(sys.argv[1])
    print(json.dumps({"isa": loaded.cpu_isa(), "torch": "torch" in sys.modules, "digests": all_digests(loaded)}))
