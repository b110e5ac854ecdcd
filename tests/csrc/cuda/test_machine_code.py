"""The machine code of the CUDA kernels: memory is accessed 16 bytes at a time, registers suffice, and instructions are few.

Needs a build with the CUDA kernels and NVIDIA's disassembler, but no GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
from op_cases import KERNELS

from bench.machine_code import FLOAT64, Kernel, download_tools, find_tools, read_kernels
from zeroopt import _C

BUILD = _C.build_info()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BUILD["cuda"], reason="this build has no CUDA kernels")]

ARCHS = [arch.removesuffix("-real") for arch in BUILD["cuda_archs"] if not arch.endswith("-virtual")]
ARCHS.sort(key=lambda arch: arch == "90")  # the last, whose kernels are looked at again
# Accesses to local memory by registers that are too many: nvcc 12.4 keeps two there in the step of RMSprop for 16-bit parameters,
# nvcc 13.0 none in any step.
SPILLS = 4 if BUILD["cuda_version"].startswith("12.") else 0
# The kernels whose every access but heads and tails is of 16 bytes, and what they do: load, store or both.
ACCESSES = {
    "step_kernel": "LDG STG",
    "pack_kernel": "LDG STG",
    "pack_segments_kernel": "LDG STG",
    "reduce_kernel": "LDG STG",
    "norm_kernel": "LDG",
    "quantize_kernel": "LDG",
    "dequantize_kernel": "STG",
    "sum_encoded_kernel": "STG",
}


@dataclass(frozen=True)
class Figures:
    """What a kernel may need at most on sm_90, where nvcc 13.0 makes it of a few percent less.

    Attributes:
        parts: of the mangled name, by which its instance is found.
        registers: of a thread; three blocks run on a multiprocessor with up to 80, two with up to 128.
        loads, stores: of 16 bytes, which a lane does in the loop that is counted.
        instructions: of a warp in that loop: of a step a tile, of a norm four.
        float64: of those.
    """

    kernel: str
    parts: tuple[str, ...]
    registers: int
    loads: int
    stores: int
    instructions: int
    float64: int = 0


def adamw(param: int, state: int, *figures: int) -> Figures:
    """By codes of ParamFormat and StateFormat."""
    return Figures("step_kernel", ("5AdamW", f"ParamFormatE{param}E", f"StateFormatE{state}E"), *figures)


FIGURES = [
    adamw(0, 0, 80, 8, 6, 460),
    adamw(1, 0, 80, 8, 7, 530),
    adamw(2, 0, 80, 8, 7, 480),
    adamw(3, 0, 80, 8, 6, 650),
    adamw(3, 2, 96, 4, 2, 1350),
    adamw(4, 1, 88, 5, 3, 1100),
    Figures("norm_kernel", ("kernelIf", "14Float64Squares"), 64, 8, 0, 140, 64),
    Figures("norm_kernel", ("kernelIf", "11PairSquares"), 64, 8, 0, 440),
    Figures("norm_kernel", ("8BFloat16", "14Float64Squares"), 64, 4, 0, 180, 64),
    Figures("norm_kernel", ("8BFloat16", "11PairSquares"), 64, 4, 0, 510),
]


def check_kernels(kernels: list[Kernel]) -> None:
    for function, accesses in ACCESSES.items():
        instances = [kernel for kernel in kernels if kernel.is_of(function)]
        assert instances, f"there is no {function}"
        for kernel in instances:
            writes_codes_alone = "11LambMoments" in kernel.name and "StateFormatE2E" in kernel.name
            for access in accesses.split():
                bits = 64 if access == "STG" and writes_codes_alone else 128  # a lane has 8 of them, a byte each
                found = re.search(rf"\b{access}\.E[.\w]*\.{bits}\b", kernel.text)
                assert found, f"{kernel.name} has no {access} of {bits // 8} bytes"
            # Who sums many does so in local memory.
            sums_many = function in ("reduce_kernel", "sum_encoded_kernel") and "Li256E" in kernel.name
            most = SPILLS if "rmsprop" in kernel.name.lower() else 0
            spilled = re.findall(r" (?:STL|LDL)[^;]*", kernel.text)
            assert sums_many or len(spilled) <= most, f"{kernel.name} uses local memory: {spilled[:3]}"
    steps = [kernel.name.lower() for kernel in kernels if kernel.is_of("step_kernel")]
    for name in KERNELS:  # which is that of its op, in other letters
        assert any(name.replace("_", "") in step for step in steps), f"there is no step of {name}"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return find_tools() or download_tools(tmp_path_factory.mktemp("cuda_tools"))
    except RuntimeError as error:
        pytest.skip(str(error))


@lru_cache(maxsize=1)
def kernels_of(arch: str, tools: Path) -> list[Kernel]:
    return read_kernels(Path(_C.__file__), arch, tools)


@pytest.mark.parametrize("arch", ARCHS)
def test_vector_accesses_and_no_spills(arch: str, tools: Path) -> None:
    check_kernels(kernels_of(arch, tools))


@pytest.fixture(scope="module")
def hopper(tools: Path) -> list[Kernel]:
    if "90" not in ARCHS:
        pytest.skip("this build has no kernels for sm_90")
    return kernels_of("90", tools)


@pytest.mark.parametrize("figures", FIGURES, ids=lambda figures: " ".join((figures.kernel, *figures.parts)))
def test_figures(figures: Figures, hopper: list[Kernel]) -> None:
    (kernel,) = [kernel for kernel in hopper if kernel.is_of(figures.kernel, *figures.parts)]
    assert kernel.registers <= figures.registers
    loop = kernel.fewest_instructions(figures.loads, figures.stores)
    assert loop is not None, "there is no loop with so many loads and stores"
    assert len(loop) <= figures.instructions
    assert sum(FLOAT64.search(code) is not None for code in loop) == figures.float64
