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
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTHS = [0, 1, 7, 15, 16, 17, 31, 33, 63, 65, 200, 1025, 300_007]
THREADS = [1, 2, 3, 5]
ITEM_BYTES = [4, 8, 2, 2]  # by dtype code
REDUCE_CODES = [(0, 0), (1, 1), (2, 2), (3, 3), (2, 0), (3, 0), (0, 2), (0, 3)]
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
    digests = {hashlib.sha256(b"".join(array.tobytes() for array in run(threads))).hexdigest() for threads in THREADS}
    assert len(digests) == 1, "the result depends on the thread count"
    return digests.pop()


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


def step_digest(kernel: Callable[..., None], num_arrays: int, groups: list[list[float]], numel: int) -> str:
    rng = np.random.default_rng(numel)
    arrays = [np.abs(rng.standard_normal(numel + 1)).astype(np.float32) for _ in range(num_arrays)]
    cuts = [0, *sorted(rng.integers(0, numel + 1, 5).tolist()), numel]
    rows = [[a + 1, b - a, i % len(groups)] for i, (a, b) in enumerate(pairwise(cuts)) if a < b]
    table = np.array(rows, np.int64).reshape(-1, 3)
    hyper = np.array(groups, np.float64)
    active = np.ones(len(rows), np.uint8)

    def run(threads: int) -> list[Array]:
        state = [array.copy() for array in arrays]
        steps = np.arange(len(rows), dtype=np.float32)
        operands: list[Array] = [*state, table, active, steps]
        pointers = [array.ctypes.data for array in operands]
        kernel(*pointers, len(rows), hyper.ctypes.data, threads)
        return [*state, steps]

    return digest(run)


def all_digests(module: ModuleType) -> dict[str, str]:
    adamw = [[1e-2, 0.9, 0.99, 1e-8, 0.1, 1, 0, 0], [1e-2, 0.3, 0.99, 1e-8, 0.1, 0, 1, 1]]
    sgd = [[1e-2, 0.9, 0.5, 0.1, 0, 0], [1e-2, 0, 0, 0, 0, 1], [1e-2, 0.9, 0, 0.1, 1, 0]]
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
        digests[f"adamw {numel}"] = step_digest(module.adamw, 5, adamw, numel)
        digests[f"sgd {numel}"] = step_digest(module.sgd, 3, sgd, numel)
    return digests


if __name__ == "__main__":
    loaded = load_module(sys.argv[1])
    print(json.dumps({"isa": loaded.cpu_isa(), "torch": "torch" in sys.modules, "digests": all_digests(loaded)}))
