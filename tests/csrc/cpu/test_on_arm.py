"""The CPU kernels compiled for 64-bit Arm give the bits of this machine's, with NEON and with SVE of any length, under an emulator:
see tests/support/on_arm."""

from __future__ import annotations

from pathlib import Path

import pytest
from on_arm import CROSS, PLAIN, TARGET, Emulated, build, missing, run
from wide_registers import count_wide_registers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
WITHOUT_SVE = "cortex-a72"  # Graviton's first; Neoverse N1 (Graviton2, Ampere Altra) has none either
SVE = {length: f"max,sve{8 * length}=on" for length in (16, 32, 64)}  # by bytes of a vector


@pytest.fixture(scope="module")
def program() -> Path:
    return build("arm", TARGET)


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Digests of this machine's kernels."""
    return digests(run([build("here", PLAIN)], ZEROOPT_CPU_ISA="generic"))


def digests(printed: str) -> list[str]:
    lines = printed.splitlines()[1:]
    assert len(lines) > 800
    return lines


def test_neon_gives_the_same_bits(program: Path, expected: list[str]) -> None:
    assert digests(Emulated(program, WITHOUT_SVE).run()) == expected


@pytest.mark.parametrize("length", SVE)
def test_sve_gives_the_same_bits(length: int, program: Path, expected: list[str]) -> None:
    printed = Emulated(program, SVE[length]).run(isa="sve")
    assert printed.startswith(f"isa: sve, vectors of {length} bytes\n")
    assert digests(printed) == expected


@pytest.mark.parametrize(
    ("processor", "chosen"),
    [
        (WITHOUT_SVE, "generic, vectors of 16"),
        (SVE[16], "generic, vectors of 16"),
        (SVE[32], "sve, vectors of 32"),
        (SVE[64], "sve, vectors of 64"),
    ],
)
def test_longer_vectors_are_chosen(processor: str, chosen: str, program: Path) -> None:
    assert Emulated(program, processor).run("--isa") == f"isa: {chosen} bytes\n"


def test_a_processor_without_sve_refuses_it(program: Path) -> None:
    with pytest.raises(AssertionError, match="ZEROOPT_CPU_ISA=sve: this processor does not support it; unset it"):
        Emulated(program, WITHOUT_SVE).run("--isa", isa="sve")


def test_sve_stays_in_its_namespace(program: Path) -> None:
    used = count_wide_registers(run([f"{CROSS}objdump", "-dC", "--no-show-raw-insn", program]))
    assert used["sve"] > 1000 and set(used) == {"sve"}, used
