"""Predictions of kernels' speed, and the reading of machine code that they start from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.kernel_limits import ACHIEVABLE, GPUS, Needs, predict
from bench.machine_code import Kernel

H100 = next(gpu for gpu in GPUS if gpu.name == "H100 SXM")
FEW = Needs(registers=32, read=4096, written=3072, at_once=4096, instructions=100)


def code(*lines: str) -> Kernel:
    """A kernel whose instructions lie 16 bytes apart."""
    return Kernel("name", "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines)), 32)


def test_what_needs_little_is_bound_by_memory() -> None:
    prediction = predict(H100, FEW)
    assert prediction.bound == "memory"
    assert prediction.share == pytest.approx(ACHIEVABLE)
    assert prediction.ideal == pytest.approx(28 / 3350)
    assert prediction.warps == 64
    assert prediction.in_flight == 64 * 4096


@pytest.mark.parametrize(
    ("change", "bound"),
    [({"instructions": 3000.0}, "issue"), ({"float64": 2000.0}, "float64"), ({"registers": 250}, "latency")],
)
def test_each_bound(change: dict[str, float], bound: str) -> None:
    slow = replace(FEW, at_once=256, **change) if bound == "latency" else replace(FEW, **change)
    prediction = predict(H100, slow)
    assert prediction.bound == bound
    assert prediction.share < ACHIEVABLE


@pytest.mark.parametrize(("registers", "warps"), [(32, 64), (33, 48), (80, 24), (81, 16), (128, 16), (129, 8)])
def test_blocks_that_registers_leave_room_for(registers: int, warps: int) -> None:
    assert predict(H100, replace(FEW, registers=registers)).warps == warps


def test_the_shortest_loop_with_all_loads_and_stores() -> None:
    kernel = code(
        "MOV R1, c[0x0][0x28]",
        "@P0 BRA 0x50",
        "LDG.E R2, desc[UR4][R2.64]",
        "STG.E desc[UR4][R2.64], R2",
        "BRA 0xa0",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "LDG.E.128 R8, desc[UR4][R2.64+0x10]",
        "@P1 BRA 0x90",
        "CALL.REL.NOINC 0x100",
        "STG.E.128 desc[UR4][R2.64], R4",
        "@!P2 BRA 0x10",
        "EXIT",
    )
    loop = kernel.fewest_instructions(loads=2, stores=1)
    assert loop is not None
    assert [line.split()[0] for line in loop] == ["LDG.E.128", "LDG.E.128", "@P1", "STG.E.128", "@!P2", "@P0"]
    assert kernel.fewest_instructions(loads=1, stores=1) is None
    assert kernel.fewest_instructions(loads=4, stores=2) is not None  # twice around
