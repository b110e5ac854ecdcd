"""The kernels, built in place for the GPU at hand alone, with what is there: nvcc, a C++ compiler, CMake and torch.

No package index is asked, and nothing is installed: pybind11's headers are those that torch carries.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from bench.gpu.command import ROOT, Ended, run_command
from bench.gpu.part import Findings, Setting

FOLDER = ROOT / "build" / "gpu"
MODULE_NAME = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
SOURCES = ("CMakeLists.txt", "cmake/**/*.cmake", "csrc/**/*.*")
TELL_ARCHS = "import json; from zeroopt._C import build_info; print(json.dumps(build_info()['cuda_archs']))"


def run(setting: Setting, limit_s: float) -> Findings:
    """Build where what is in place was not built of these sources for these GPUs, and say what is there then."""
    archs = [] if setting.rehearses else archs_at_hand()
    built = Ended(0, 0.0, "") if setting.rehearses or is_built_for(archs) else build(archs, limit_s)
    told = run_command([sys.executable, "-m", "zeroopt", "env"], limit_s=240)
    note = f"Built for {', '.join(archs)} in {built.seconds:.0f} s." if built.seconds else "Taken as it is."
    return Findings(
        built.problem or told.problem,
        notes=[note, f"```text\n{told.output.strip()}\n```"],
        figures={"archs": archs, "seconds": built.seconds},
        output=built.output + told.output,
    )


def archs_at_hand() -> list[str]:
    """Of all GPUs, as CMake writes them: "90-real" is machine code for compute capability 9.0, and nothing else."""
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f"{major}{minor}-real" for major, minor in sorted(capabilities)]


def is_built_for(archs: list[str]) -> bool:
    """Whether the module in place has machine code for all of them, and no source is newer."""
    if not module().exists() or newest_source_s() > module().stat().st_mtime:
        return False
    told = run_command([sys.executable, "-c", TELL_ARCHS], limit_s=240)
    if told.status != 0:
        return False
    built = {arch.partition("-")[0] for arch in json.loads(told.output.splitlines()[-1])}
    return {arch.partition("-")[0] for arch in archs} <= built


def module() -> Path:
    """Where the compiled module belongs."""
    return ROOT / "zeroopt" / MODULE_NAME


def newest_source_s() -> float:
    return max(path.stat().st_mtime for pattern in SOURCES for path in ROOT.glob(pattern))


def build(archs: list[str], limit_s: float) -> Ended:
    """Configure, compile in `FOLDER`, and put the module in its place."""
    cmake = shutil.which("cmake")
    if cmake is None:
        return Ended(127, 0.0, "there is no cmake: install version 3.24 or newer\n")
    configured = run_command([cmake, *options(archs)], limit_s)
    if configured.problem is not None:
        return configured
    cores = len(os.sched_getaffinity(0))
    compiled = run_command([cmake, "--build", str(FOLDER), "--parallel", str(cores)], limit_s - configured.seconds)
    if compiled.problem is None:
        install(FOLDER / MODULE_NAME)
    seconds = configured.seconds + compiled.seconds
    return Ended(compiled.status, seconds, configured.output + compiled.output)


def options(archs: list[str]) -> list[str]:
    torch_include = Path(torch.__file__).parent / "include"
    return [
        *("-S", str(ROOT), "-B", str(FOLDER), *(["-G", "Ninja"] if shutil.which("ninja") else [])),
        f"-DZEROOPT_CUDA={'on' if archs else 'off'}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(archs)}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={ROOT / 'cmake' / 'torch_pybind11'}",
        f"-DZEROOPT_TORCH_INCLUDE={torch_include}",
    ]


def install(built: Path) -> None:
    """Processes that have loaded the former one keep it."""
    waiting = module().with_suffix(".new")
    shutil.copy2(built, waiting)
    waiting.replace(module())
