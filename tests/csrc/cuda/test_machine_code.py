"""The machine code of the CUDA kernels: memory is accessed 16 bytes at a time, and registers suffice.

Needs a build with the CUDA kernels and NVIDIA's disassembler, but no GPU. The disassembler is taken from PATH or
CUDA_HOME, else from PyPI.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from op_cases import KERNELS

from zeroopt import _C

BUILD = _C.build_info()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BUILD["cuda"], reason="this build has no CUDA kernels")]

ARCHS = [arch.removesuffix("-real") for arch in BUILD["cuda_archs"] if not arch.endswith("-virtual")]
PACKAGES = ["nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"]
# The kernels whose every access but heads and tails is of 16 bytes, and what they do: load, store or both.
ACCESSES = {
    "step_kernel": "LDG STG",
    "pack_kernel": "LDG STG",
    "pack_segments_kernel": "LDG STG",
    "reduce_kernel": "LDG STG",
    "norm_kernel": "LDG",
    "quantize_kernel": "LDG",
    "dequantize_kernel": "STG",
}


def installed_tools() -> Path | None:
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    on_path = shutil.which("cuobjdump")
    folders += [Path(on_path).parent] if on_path else []
    return next((folder for folder in folders if all((folder / t).exists() for t in ("cuobjdump", "nvdisasm"))), None)


def downloaded_tools(folder: Path) -> Path:
    """Unpacks the tools without installing them. Skips where there is no package index to be reached."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"no cuobjdump on PATH or in CUDA_HOME, and none to download: {result.stderr[-500:]}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    tools = next(folder.rglob("cuobjdump")).parent
    for tool in ("cuobjdump", "nvdisasm"):
        (tools / tool).chmod(0o755)
    return tools


def machine_code(library: Path, arch: str, tools: Path) -> dict[str, str]:
    """The instructions of each kernel, by its mangled name."""
    command = [str(tools / "cuobjdump"), "--dump-sass", "--gpu-architecture", f"sm_{arch}", str(library)]
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    parts = re.split(r"^\s*Function : (\w+)$", result.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def kernels_of(code: dict[str, str], kernel: str) -> Iterator[tuple[str, str]]:
    """Its instances: in a mangled name, the name's length comes before it."""
    return ((name, text) for name, text in code.items() if f"cuda{len(kernel)}{kernel}" in name)


def check_kernels(code: dict[str, str]) -> None:
    for kernel, accesses in ACCESSES.items():
        instances = list(kernels_of(code, kernel))
        assert instances, f"there is no {kernel}"
        for name, text in instances:
            for access in accesses.split():
                assert re.search(rf"\b{access}\.E[.\w]*\.128\b", text), f"{name} has no {access} of 16 bytes"
            sums_many = kernel == "reduce_kernel" and "Li256E" in name  # in local memory
            spilled = re.search(r"\b(STL|LDL)\b.*", text)
            assert sums_many or not spilled, f"{name} uses local memory: {spilled}"
    for kernel in KERNELS:  # whose name is that of its op, in other letters
        op = kernel.replace("_", "")
        assert any(op in name.lower() for name, _ in kernels_of(code, "step_kernel")), f"there is no step of {kernel}"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed_tools() or downloaded_tools(tmp_path_factory.mktemp("cuda_tools"))


@pytest.mark.parametrize("arch", ARCHS)
def test_vector_accesses_and_no_spills(arch: str, tools: Path) -> None:
    check_kernels(machine_code(Path(_C.__file__), arch, tools))
