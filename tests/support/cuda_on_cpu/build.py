"""Compiles the sources of csrc/cuda, unchanged, into a shared object that runs on the CPU."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paths import ROOT

SHIM = Path(__file__).parent
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "cuda_on_cpu"
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


def build_kernels() -> Path:
    """All kernels, in a folder with their objects: for all who ask, built once for each state of the sources."""
    files = [path for root in (CSRC, SHIM) for path in sources_in(root)]
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    sources = [*kernels, SHIM / "grid.cpp", SHIM / "module.cpp"]
    return build_once(KEPT / f"kernels-{digest(files)}", lambda folder: build(folder, sources))


def build_once(folder: Path, fill: Callable[[Path], Path]) -> Path:
    """What `fill` returns: a file that it makes in a folder, if nobody has so far. Others who ask meanwhile wait."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            done.write_text(fill(folder).name)
    return folder / done.read_text()


def sources_in(folder: Path) -> list[Path]:
    """All files in it and below, but for bytecode, which comes and goes as other processes import."""
    return [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts and path.is_file()]


def digest(files: Iterable[Path]) -> str:
    """A name for the state of some files."""
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def build_steps(root: Path, built: Path) -> Path:
    """The kernels of the steps from the sources in root/cuda, and the others that build_kernels left in `built`."""
    others = [path for path in built.glob("*.o") if path.stem != "steps"]
    return build(root, [root / "cuda" / "steps.cu"], root, others)
