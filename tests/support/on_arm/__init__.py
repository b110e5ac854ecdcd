"""The CPU kernels compiled for 64-bit Arm beside those for this machine, and run under an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_on_cpu.build import CSRC, build_once, digest, sources_in
from paths import ROOT

HERE = Path(__file__).parent
KEPT = ROOT / "build" / "on_arm"
CROSS = "aarch64-linux-gnu-"
TARGET = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={CROSS}g++",
)
LIBRARIES = "/usr/aarch64-linux-gnu"  # of Arm's, where Debian puts them
# For no processor that cmake/cpu.cmake knows, so generic kernels alone, and hardly optimised: that vectors take the place of
# plain loops must not matter either.
PLAIN = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=any", "-DKERNEL_DIGESTS_FLAGS=-O1")


def emulator() -> str | None:
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def missing() -> str | None:
    """What this takes and is not installed, for people."""
    needed = {"cmake": shutil.which("cmake"), f"{CROSS}g++": shutil.which(f"{CROSS}g++"), "qemu-aarch64": emulator()}
    lacking = [name for name, path in needed.items() if path is None]
    return f"not installed: {', '.join(lacking)} (Debian: g++-aarch64-linux-gnu, qemu-user)" if lacking else None


def run(command: Sequence[str | Path], **environment: str) -> str:
    """What a command prints. Raises AssertionError with what it says where it fails."""
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(name: str, options: Sequence[str]) -> Path:
    """The program of kernel_digests.cpp: built once for each state of the sources."""
    sources = [path for root in (HERE, CSRC, ROOT / "cmake") for path in sources_in(root)]

    def fill(folder: Path) -> Path:
        run(["cmake", "-S", HERE, "-B", folder, *options])
        run(["cmake", "--build", folder, "--parallel", "2"])
        return folder / "kernel_digests"

    return build_once(KEPT / f"{name}-{digest(sources)}", fill)


@dataclass(frozen=True)
class Emulated:
    """A program for Arm.

    Attributes:
        processor: as `qemu-aarch64 -cpu` takes it.
    """

    program: Path
    processor: str

    def run(self, *arguments: str, isa: str = "") -> str:
        path = emulator()
        assert path is not None
        return run([path, "-L", LIBRARIES, "-cpu", self.processor, self.program, *arguments], ZEROOPT_CPU_ISA=isa)
