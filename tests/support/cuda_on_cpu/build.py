"""Compiles the sources of csrc/cuda, unchanged, into a shared object that runs on the CPU."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paths import ROOT

SHIM = Path(__file__).parent
CSRC = ROOT / "csrc"
# As the CPU kernels, for the bits. Vectors at odd addresses are found by the alignment check, see grid.cpp.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=alignment"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or shutil.which("c++") or "g++")


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


def build(folder: Path, sources: list[Path], root: Path = CSRC, objects: list[Path] | None = None) -> Path:
    """The shared object of these sources and objects. Sources include the files of `root`, then those of csrc."""
    includes = [f"-I{path}" for path in (SHIM, root, CSRC)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        language = ["-x", "c++", "-include", "cuda_runtime.h"]
        run([*compiler(), *language, *FLAGS, *WARNINGS, *includes, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(max_workers=2) as threads:
        compiled = list(threads.map(compile_one, sources))
    library = folder / "cuda_on_cpu.so"
    run([*compiler(), "-shared", *map(str, compiled + (objects or [])), "-o", str(library)])
    return library


def build_kernels(folder: Path) -> Path:
    """All kernels."""
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    return build(folder, [*kernels, SHIM / "grid.cpp", SHIM / "module.cpp"])


def build_steps(root: Path, built: Path) -> Path:
    """The kernels of the steps from the sources in root/cuda, and the others that build_kernels left in `built`."""
    others = [path for path in built.glob("*.o") if path.stem != "steps"]
    return build(root, [root / "cuda" / "steps.cu"], root, others)
