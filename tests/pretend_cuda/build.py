"""Compiles the device, and the kernels of csrc/cuda that run on it, once for each state of their sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from cuda_on_cpu.build import CSRC, SHIM, build_kernels, compiler, run
from paths import ROOT

SOURCES = Path(__file__).parent / "csrc"
FOLDER = ROOT / "build" / "pretend_cuda"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]


def build_device() -> Path:
    """The Python module of the device, `_device`."""
    torch_folder = _folder_of_torch()
    files = [*sorted(SOURCES.iterdir()), torch_folder / "version.py"]
    with _once(FOLDER / f"device-{_digest(files)}") as folder:
        if folder is not None:
            _compile_device(folder, torch_folder)
    return FOLDER / f"device-{_digest(files)}" / "_device.so"


def build_cuda_kernels() -> Path:
    """The kernels, by the names that tests/support/cuda_on_cpu/module.cpp gives them."""
    files = [
        path for root in (CSRC, SHIM) for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".pyc"
    ]
    with _once(FOLDER / f"kernels-{_digest(files)}") as folder:
        if folder is not None:
            build_kernels(folder)
    return FOLDER / f"kernels-{_digest(files)}" / "cuda_on_cpu.so"


def load_device() -> ModuleType:
    """Load the device. torch must not have been imported: it asks for devices but once."""
    assert "torch" not in sys.modules, "the pretend device has to be loaded before torch"
    spec = importlib.util.spec_from_file_location("_device", build_device())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["_device"] = module
    return module


def _compile_device(folder: Path, torch_folder: Path) -> None:
    include = torch_folder / "include"
    python = sysconfig.get_path("include")
    includes = [f"-isystem{path}" for path in (include, include / "torch" / "csrc" / "api" / "include", python)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run([*compiler(), *FLAGS, *includes, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(max_workers=2) as threads:
        objects = list(threads.map(compile_one, sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)))
    library = torch_folder / "lib"
    link = [f"-L{library}", f"-Wl,-rpath,{library}", "-lc10", "-ltorch_cpu"]
    run([*compiler(), "-shared", *map(str, objects), *link, "-o", str(folder / "_device.so")])


def _folder_of_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _once(folder: Path) -> Iterator[Path | None]:
    """The folder if nobody has filled it so far, else None. Others who ask meanwhile wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if done.exists():
            yield None
            return
        yield folder
        done.touch()
