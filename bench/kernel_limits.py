"""What bounds the CUDA kernels on GPUs, predicted from their machine code and the GPUs' data sheets. Nothing is measured.

    python -m bench.kernel_limits                       # of the kernels in zeroopt._C
    python -m bench.kernel_limits --library build/_C.so

A multiprocessor works on a tile of 256 elements for the longest of

    memory    the tile's bytes at the multiprocessor's share of the bandwidth, of which copies reach nine tenths
    issue     a warp's instructions, four warps at a time
    float64   its float64 instructions, on as many lanes as there are for them
    latency   one warp's turn, from its loads to its stores, divided by the warps that take turns

so the last of these is Little's law: too few bytes are on the way when warps are few and their turns long. What is left out makes
real figures worse: bounds that coincide, the last blocks of a launch, and launches themselves, some microseconds each.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine_code import FLOAT64, Kernel, download_tools, find_tools, read_kernels
from zeroopt import _C

TILE = 256  # elements
BLOCK_WARPS = 8
REGISTERS = 65536  # of a multiprocessor
SCHEDULERS = 4
ACHIEVABLE = 0.92  # of the bandwidth that data sheets name: about what copies reach
ISSUE_INTERVAL = (
    2.0  # cycles between a lone warp's instructions, most of which belong to elements that do not wait for each other
)


@dataclass(frozen=True)
class Gpu:
    """A GPU, from its data sheet, but for the latency, which is assumed.

    Attributes:
        arch: of the machine code that runs there.
        clock: of the multiprocessors, GHz, boosted.
        bandwidth: of memory, bytes a nanosecond.
        float64_lanes: additions or multiplications that a multiprocessor begins in a cycle.
        threads: that a multiprocessor holds.
        latency: of a load from memory that is busy, nanoseconds.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float
    float64_lanes: int
    threads: int
    latency: float

    @property
    def has_slow_float64(self) -> bool:
        """As csrc/cuda/norm.cu asks."""
        return 128 / self.float64_lanes > 4


GPUS = [
    Gpu("H100 SXM", "90", 132, 1.98, 3350, 64, 2048, 700),
    Gpu("H200", "90", 132, 1.98, 4800, 64, 2048, 700),
    Gpu("B200", "100", 148, 1.97, 8000, 64, 2048, 800),
    Gpu("B300", "100", 148, 1.92, 8000, 2, 2048, 800),
    Gpu("RTX 4090", "86", 128, 2.52, 1008, 2, 1536, 600),
]


@dataclass(frozen=True)
class Case:
    """A kernel with its formats.

    Attributes:
        function, parts: by which its instance is found; see `Kernel.is_of`.
        read, written: bytes an element.
        loads, stores: of 16 bytes, which a lane does in its loop.
        tiles: that the loop handles at a time.
    """

    name: str
    function: str
    parts: tuple[str, ...]
    read: float
    written: float
    loads: int
    stores: int
    tiles: int = 1


def _adamw(name: str, param: int, state: int, *figures: int) -> Case:
    return Case(name, "step_kernel", ("5AdamW", f"ParamFormatE{param}E", f"StateFormatE{state}E"), *figures)


def _norm(name: str, element: str, sums: str, item_bytes: int) -> Case:
    return Case(name, "norm_kernel", (element, sums), item_bytes, 0, 2 * item_bytes, 0, tiles=4)


STEPS = [
    _adamw("AdamW, float32", 0, 0, 16, 12, 8, 6),
    _adamw("AdamW, bfloat16 and float32 master", 1, 0, 16, 14, 8, 7),
    _adamw("AdamW, bfloat16 and remainder", 3, 0, 16, 12, 8, 6),
    _adamw("AdamW, bfloat16 and remainder, 8-bit moments", 3, 2, 10, 6, 4, 2),
    _adamw("AdamW, bfloat16 stochastic, moments too", 4, 1, 10, 6, 5, 3),
]
NORMS = {
    False: [
        _norm("norm of float32", "kernelIf", "14Float64Squares", 4),
        _norm("norm of bfloat16", "8BFloat16", "14Float64Squares", 2),
    ],
    True: [
        _norm("norm of float32, in pairs", "kernelIf", "11PairSquares", 4),
        _norm("norm of bfloat16, in pairs", "8BFloat16", "11PairSquares", 2),
    ],
}
"""By whether float64 is slow."""


@dataclass(frozen=True)
class Needs:
    """What a warp needs for a tile.

    Attributes:
        registers: of a thread.
        read, written: bytes.
        at_once: bytes that it has on the way before it uses any.
        instructions: executed, of which
        float64: are of that kind.
    """

    registers: int
    read: float
    written: float
    at_once: float
    instructions: float
    float64: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Of a kernel on a GPU.

    Attributes:
        ideal: nanoseconds an element at the full bandwidth.
        bounds: nanoseconds an element by what bounds it.
        warps: on a multiprocessor at once.
        in_flight: bytes that they can have on the way.
        needed: bytes that have to be on the way for the bandwidth.
    """

    ideal: float
    bounds: dict[str, float]
    warps: int
    in_flight: float
    needed: float

    @property
    def bound(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def next_bound(self) -> str:
        """And how long that takes, as a part of what bounds it."""
        name, time = sorted(self.bounds.items(), key=lambda item: item[1])[-2]
        return f"{name} {100 * time / self.bounds[self.bound]:.0f} %"

    @property
    def share(self) -> float:
        """Of the bandwidth."""
        return self.ideal / self.bounds[self.bound]


def predict(gpu: Gpu, needs: Needs) -> Prediction:
    """Predict how fast a kernel is on large segments."""
    in_registers = REGISTERS // (-(-needs.registers // 8) * 8 * BLOCK_WARPS * 32)
    warps = BLOCK_WARPS * min(in_registers, gpu.threads // (BLOCK_WARPS * 32))
    num_bytes = needs.read + needs.written
    share = gpu.bandwidth / gpu.multiprocessors
    rounds = needs.read / needs.at_once
    turn = rounds * gpu.latency + needs.instructions * ISSUE_INTERVAL / gpu.clock
    of_a_tile = {
        "memory": num_bytes / share / ACHIEVABLE,
        "issue": needs.instructions / SCHEDULERS / gpu.clock,
        "float64": needs.float64 * 32 / gpu.float64_lanes / gpu.clock,
        "latency": turn / warps,
    }
    elements = TILE * gpu.multiprocessors
    return Prediction(
        ideal=num_bytes / gpu.bandwidth / TILE,
        bounds={name: time / elements for name, time in of_a_tile.items()},
        warps=warps,
        in_flight=warps * needs.at_once,
        needed=share * needs.read / num_bytes * gpu.latency,
    )


def needs_of(case: Case, kernels: Sequence[Kernel]) -> Needs:
    """Read from machine code.

    Raises:
        RuntimeError: there is no such kernel, or it has no such loop.
    """
    found = [kernel for kernel in kernels if kernel.is_of(case.function, *case.parts)]
    loop = found[0].fewest_instructions(case.loads, case.stores) if len(found) == 1 else None
    if loop is None:
        raise RuntimeError(
            f"{case.name}: expected one kernel with {case.loads} loads and {case.stores} stores in its loop"
        )
    return Needs(
        registers=found[0].registers,
        read=case.read * TILE,
        written=case.written * TILE,
        at_once=case.read * TILE * case.tiles,
        instructions=len(loop) / case.tiles,
        float64=sum(FLOAT64.search(code) is not None for code in loop) / case.tiles,
    )


def rows(gpu: Gpu, kernels: Sequence[Kernel]) -> list[str]:
    """Rows of the table in Markdown."""
    result = []
    for case in STEPS + NORMS[gpu.has_slow_float64]:
        needs = needs_of(case, kernels)
        prediction = predict(gpu, needs)
        time = prediction.bounds[prediction.bound]
        cells = [
            case.name,
            gpu.name,
            f"{needs.registers}",
            f"{prediction.warps}",
            f"{needs.instructions:.0f}",
            f"{prediction.in_flight / 1000:.0f} / {prediction.needed / 1000:.0f}",
            f"{1000 * prediction.ideal:.2f}",
            f"{1000 * time:.2f}",
            f"{100 * prediction.share:.0f} %",
            prediction.bound,
            prediction.next_bound,
        ]
        result.append(f"| {' | '.join(cells)} |")
    return result


HEADINGS = (
    "kernel",
    "GPU",
    "registers",
    "warps",
    "instructions a tile",
    "KB on the way / needed",
    "bytes ÷ bandwidth, ms for 10⁹ elements",
    "predicted",
    "of the bandwidth",
    "bound by",
    "next, of that",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=Path(_C.__file__), help="a build with the CUDA kernels")
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    with tempfile.TemporaryDirectory() as folder:
        tools = find_tools() or download_tools(Path(folder))
        of_arch = {arch: read_kernels(arguments.library, arch, tools) for arch in {gpu.arch for gpu in GPUS}}
    for gpu in GPUS:
        print("\n".join(rows(gpu, of_arch[gpu.arch])))


if __name__ == "__main__":
    main()
