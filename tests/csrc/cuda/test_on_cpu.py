"""The CUDA kernels against the CPU kernels, bit for bit, without a GPU: see tests/support/cuda_on_cpu."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.build import CSRC, SHIM, build, build_kernels, build_steps, compiler
from cuda_on_cpu.compare import (
    EVERY_NUMEL,
    LAYOUTS,
    MIXED_NUMELS,
    REDUCE_PAIRS,
    SCALARS,
    STEPS,
    Segments,
    Step,
    compare_norms,
    compare_pack,
    compare_pack_segments,
    compare_quantize,
    compare_reduce,
    compare_step,
    compare_wire_code,
)
from cuda_on_cpu.devices import CpuDevice, ShimDevice
from op_cases import KERNELS

from zeroopt import _C

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="there is no C++ compiler"),
]
FEW_LARGE = (5000, 1, 4096, 4097)
MORE_THAN_A_LAUNCH = tuple(range(1, 260))  # of pack_segments, which takes so many arrays at a time


@pytest.fixture(scope="module")
def library() -> Path:
    return build_kernels()


@pytest.fixture
def shim(library: Path) -> ShimDevice:
    return ShimDevice(library)


@pytest.fixture
def cpu() -> CpuDevice:
    return CpuDevice(_C)


def test_a_kernel_that_does_nothing(shim: ShimDevice) -> None:
    shim.run("try_launch")


@pytest.mark.parametrize(("op", "formats"), STEPS)
def test_steps_in_all_formats(op: str, formats: tuple[int, int, int], shim: ShimDevice, cpu: CpuDevice) -> None:
    for layout in LAYOUTS:
        compare_step(shim, cpu, Step(op, *formats, Segments(layout=layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("formats", [(0, 0, 0), (3, 2, 1), (4, 3, 2), (1, 2, 2)])
def test_steps_of_every_length(formats: tuple[int, int, int], layout: str, shim: ShimDevice, cpu: CpuDevice) -> None:
    compare_step(shim, cpu, Step("adamw", *formats, Segments(EVERY_NUMEL, layout)))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("state", range(3))
def test_steps_of_special_values(op: str, state: int, shim: ShimDevice, cpu: CpuDevice) -> None:
    for param, layout in product(range(5), ("shifted", "scattered")):
        compare_step(shim, cpu, Step(op, param, (0, 2, 3)[state], state, Segments(layout=layout, special=True)))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("scalars", SCALARS)
def test_scalars_in_memory(
    op: str, scalars: tuple[float | None, float | None, float | None], shim: ShimDevice, cpu: CpuDevice
) -> None:
    for state in range(3):
        compare_step(shim, cpu, Step(op, 2, 3, state, Segments(), *scalars))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("reverse_order", [False, True])
@pytest.mark.parametrize("num_multiprocessors", [1, 5])
def test_steps_on_any_grid(
    op: str, num_multiprocessors: int, reverse_order: bool, library: Path, cpu: CpuDevice
) -> None:
    shim = ShimDevice(library, num_multiprocessors, reverse_order)
    for numels in ((3,), FEW_LARGE, tuple(range(1, 1000, 37)) * 20):
        compare_step(shim, cpu, Step(op, 4, 2, 2, Segments(numels)))


@pytest.mark.parametrize("op", KERNELS)
def test_thousands_of_segments(op: str, library: Path, cpu: CpuDevice) -> None:
    segments = Segments((1, 300, 7, 20, 1) * 700)
    shim = ShimDevice(library, num_multiprocessors=2)
    compare_step(shim, cpu, Step(op, 0, 0, 0, segments))
    compare_norms(shim, cpu, 0, segments)


@pytest.mark.parametrize("float64_ratio", [2, 64])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("grad", [0, 2, 3])
def test_squared_norms(grad: int, special: bool, float64_ratio: int, library: Path, cpu: CpuDevice) -> None:
    for layout, reverse_order in zip(LAYOUTS, (False, True, False), strict=True):
        shim = ShimDevice(library, 3, reverse_order, float64_ratio)
        for numels in (EVERY_NUMEL[::5], FEW_LARGE, (70_000,)):
            compare_norms(shim, cpu, grad, Segments(numels, layout, special))


@pytest.mark.parametrize("float64_ratio", [2, 64])
@pytest.mark.parametrize("magnitude", [1e-44, 1e-30, 1e-18, 1e-16, 1e-14, 1.0, 1e14, 1e16, 3e38])
def test_squared_norms_of_any_magnitude(magnitude: float, float64_ratio: int, library: Path) -> None:
    """Against exact sums. Elements that float32 cannot square lie beside zeros and beside those that it can."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(20_000).clip(-1, 1) * magnitude).astype(np.float32)
    values[rng.random(values.size) < 0.3] = 0.0
    values[5000:6000] = 0.0
    values[10_000:] = np.where(rng.random(10_000) < 0.5, values[10_000:], rng.standard_normal(10_000))
    shim = ShimDevice(library, 2, float64_ratio=float64_ratio)
    for begin, end in ((0, 10_000), (10_000, 20_000), (0, 20_000), (5000, 6000)):
        part = values[begin:end]
        rows = np.zeros((1, 13), np.int64)
        rows[0, 0], rows[0, 6] = part.size, shim.put(part)
        squares, found_inf = shim.put(np.zeros((1, 2))), shim.put(np.zeros(1, np.float32))
        args = (shim.put(rows), shim.put(np.ones(1, np.uint8)), squares, 1, 0, found_inf)
        shim.run_over_segments("squared_norms", *args, count=1, total_numel=part.size)
        exact = math.fsum(float(value) ** 2 for value in part.astype(np.float64))
        np.testing.assert_allclose(shim.get(squares)[0, 0], exact, rtol=1e-12)
        assert shim.get(found_inf)[0] == 0


@pytest.mark.parametrize(("src", "dst"), list(product(range(4), range(4))))
def test_pack_segments(src: int, dst: int, shim: ShimDevice, cpu: CpuDevice) -> None:
    for layout, numels in product(LAYOUTS, (MIXED_NUMELS, MORE_THAN_A_LAUNCH, FEW_LARGE)):
        compare_pack_segments(shim, cpu, src, dst, Segments(numels, layout))


@pytest.mark.parametrize("is_signed", [False, True])
def test_quantize(is_signed: bool, shim: ShimDevice, cpu: CpuDevice) -> None:
    for numel, shifts in product([0, 1, 8, 255, 256, 257, 3001], [(0, 0), (4, 8), (1, 0), (0, 1)]):
        compare_quantize(shim, cpu, numel, shifts, is_signed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [0, 2, 3])
def test_wire_code(dtype: int, bits: int, shim: ShimDevice, cpu: CpuDevice) -> None:
    for numel, num_slices, shift in product([0, 1, 8, 128, 255, 256, 257, 1000], [1, 2, 3, 8, 9, 21], [0, 1]):
        compare_wire_code(shim, cpu, dtype, bits, numel, num_slices, shift)


@pytest.mark.parametrize("src", range(4))
def test_pack(src: int, shim: ShimDevice, cpu: CpuDevice) -> None:
    for dst, numel, shifts in product(range(4), [0, 1, 7, 8, 9, 40, 2100], [(0, 0), (2, 2), (3, 3), (0, 1)]):
        compare_pack(shim, cpu, src, dst, numel, shifts)


@pytest.mark.parametrize("pair", REDUCE_PAIRS)
def test_reduce(pair: tuple[int, int], shim: ShimDevice, cpu: CpuDevice) -> None:
    for num_slices, numel, shift in product([1, 2, 3, 8, 9, 21, 256], [0, 1, 9, 2100], [0, 1]):
        compare_reduce(shim, cpu, pair, num_slices, numel, shift)


# The comparison itself, of sources that are wrong in one place.

MUTATIONS = {
    "a tail that ends early": (
        "lane.cuh",
        "static_cast<int>(left) : kLaneNumel",
        "static_cast<int>(left) - 1 : kLaneNumel",
    ),
    "a head that is ignored": ("lane.cuh", "first < 0 ? static_cast<int>(-first) : 0", "0"),
    "a shuffle that leaves out half of the lanes": ("lane.cuh", "distance = kWarp / 2", "distance = kWarp / 4"),
    "vectors that are cut elsewhere": ("tiles.cuh", "(aligned ? lead : 0)", "0"),
    "random numbers of the next call": ("formats.cuh", "bits.half[0] >> shift |", "next.half[0] >> shift |"),
    "a barrier that is missing": ("segment_work.cuh", "__syncthreads();", ""),
}


ADAMW_ALONE = """
#pragma once
#include "ops/adamw.h"
namespace zeroopt {
template <class... Ops> struct OpList {};
using AllOps = OpList<AdamW>;
} // namespace zeroopt
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the kernels, with the step of one optimizer: compiling those of all takes many times as long."""
    shutil.copytree(CSRC / "cuda", tmp_path / "cuda")
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "all.h").write_text(ADAMW_ALONE)
    return tmp_path


def compare_adamw(library: Path, cpu: CpuDevice) -> None:
    shim = ShimDevice(library, reverse_order=True)
    for state, layout in product(range(3), LAYOUTS):
        compare_step(shim, cpu, Step("adamw", 4, 2, state, Segments(layout=layout)))


def test_a_copy_is_as_good(sources: Path, library: Path, cpu: CpuDevice) -> None:
    compare_adamw(build_steps(sources, library.parent), cpu)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_found(name: str, sources: Path, library: Path, cpu: CpuDevice) -> None:
    file, right, wrong = MUTATIONS[name]
    path = sources / "cuda" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    wrong_library = build_steps(sources, library.parent)
    with pytest.raises(AssertionError):
        compare_adamw(wrong_library, cpu)


class ShimKernels:
    """The kernels of shim_kernels.cpp, by their numbers there."""

    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).run_shim_kernel
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool]
        self.source = np.arange(128, dtype=np.int64) ** 2
        self.out = np.zeros(128, np.int64)

    def run(self, kernel: int, reverse_order: bool = False) -> str:
        error: bytes = self._run(kernel, self.source.ctypes.data, self.out.ctypes.data, reverse_order)
        return error.decode()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ShimKernels:
    folder = tmp_path_factory.mktemp("shim")
    return ShimKernels(build(folder, [SHIM / "grid.cpp", SHIM / "shim_kernels.cpp"]))


@pytest.mark.parametrize("reverse_order", [False, True])
def test_shared_memory_and_shuffles(kernels: ShimKernels, reverse_order: bool) -> None:
    assert kernels.run(0, reverse_order) == ""
    sums = kernels.source.reshape(2, 64).sum(axis=1)
    np.testing.assert_array_equal(kernels.out, np.repeat(sums, 64))
    assert kernels.run(1, reverse_order) == ""
    np.testing.assert_array_equal(kernels.out, kernels.source[np.arange(128) ^ 17])


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (2, "block 0: thread 0 at the barrier of line .* waits for thread 40, which has finished"),
        (3, "thread 0 at the barrier of line .* waits for thread 32 at the barrier of line"),
        (4, "thread 32 at the shuffle of line .* waits for thread 40, which has finished"),
        (5, "a lane that its mask leaves out"),
        (6, "block 0, thread 0: a vector at an address that is 8 after a multiple of 16"),
    ],
)
def test_divergence_ends_the_launch(kernels: ShimKernels, kernel: int, message: str) -> None:
    assert re.search(message, kernels.run(kernel))
