"""Compiles the device, once for each state of its sources."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from cuda_on_cpu.build import build_once, compiler, digest, run
from paths import ROOT

SOURCES = Path(__file__).parent / "csrc"
FOLDER = ROOT / "build" / "pretend_cuda"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]


def build_device() -> Path:
    """The Python module of the device, `_device`."""
    torch_folder = _folder_of_torch()
    files = [*sorted(SOURCES.iterdir()), torch_folder / "version.py"]
    return build_once(FOLDER / f"device-{digest(files)}", lambda folder: _compile_device(folder, torch_folder))


def load_device() -> ModuleType:
    """Load the device. torch must not have been imported: it asks for devices but once."""
    assert "torch" not in sys.modules, "the pretend device has to be loaded before torch"
    spec = importlib.util.spec_from_file_location("_device", build_device())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["_device"] = module
    return module


def _compile_device(folder: Path, torch_folder: Path) -> Path:
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
    # Whoever opens CUDA's driver by its name gets this module, which tells of captures as it does.
    link = ["-Wl,-soname,libcuda.so.1", f"-L{library}", f"-Wl,-rpath,{library}", "-lc10", "-ltorch_cpu"]
    module = folder / "_device.so"
    run([*compiler(), "-shared", *map(str, objects), *link, "-o", str(module)])
    return module


def _folder_of_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
