"""What the build says of itself, and what becomes of kernels that are not in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from op_cases import KERNELS
from paths import ROOT

from zeroopt import _C
from zeroopt.errors import KernelUnavailableError

# kernel, rows, active, steps, squares, count, three formats, groups, three scalars, seed, total_numel, workspace, stream
STEP = ("adamw", 64, 64, 64, 64, 1, 0, 0, 0, 64, 0, 0, 0, 0, 4, 64, 0)
# What is read on the host: four elements at addresses where nothing is.
ROW, ACTIVE = np.array([4, 0, 0, 0, 128, 0, 64, *[0] * 6]), np.ones(1, np.uint8)
CUDA_CALLS = {
    "cuda_try_launch": (0,),
    "cuda_pack": (64, 0, 128, 0, 4, 1.0, 0),
    "cuda_pack_segments": (ROW.ctypes.data, ACTIVE.ctypes.data, 1, 0, 0, 1.0, 0),
    "cuda_reduce": ([64], 0, 0, 128, 0, 4, 0),
    "cuda_quantize": (64, 128, 192, 4, True, 0),
    "cuda_dequantize": (64, 128, 192, 4, True, 0),
    "cuda_encode_slices": (64, 0, 128, 192, 4, 1, 8, 0, 0, 0, 0),
    "cuda_sum_encoded": ([64], 8, 0, 128, 0, 4, 0),
    "cuda_squared_norms": (64, 64, 64, 1, 0, 64, 4, 64, 0),
    "cuda_step": STEP,
}


def test_build_info_is_complete() -> None:
    build = _C.build_info()
    assert build["version"] == version("zeroopt")
    assert build["compiler"].split()[1][0].isdigit()
    assert "-ffp-contract=off" in build["flags"] or "GNU" not in build["compiler"]
    assert build["isa"] == _C.cpu_isa()
    assert build["openmp"] == "" or Path(build["openmp"]).is_file()
    assert build["cuda"] == bool(build["cuda_version"]) == bool(build["cuda_archs"]) == (not build["cuda_problem"])


@pytest.mark.skipif(_C.build_info()["cuda"], reason="this build has the CUDA kernels")
@pytest.mark.parametrize("name", CUDA_CALLS)
def test_missing_kernel_says_how_to_get_it(name: str) -> None:
    with pytest.raises(KernelUnavailableError, match="ZEROOPT_CUDA=on pip install"):
        getattr(_C, name)(*CUDA_CALLS[name])


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="this build has no CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", CUDA_CALLS)
def test_launch_without_a_driver_raises(name: str) -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        getattr(_C, name)(*CUDA_CALLS[name])


def test_every_cuda_kernel_is_called_here() -> None:
    assert {name for name in dir(_C) if name.startswith("cuda_")} == {
        *CUDA_CALLS,
        "cuda_norm_workspace_bytes",
        "cuda_step_workspace_bytes",
        "cuda_driver_version",
    }


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="this build has no CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_driver_there_is_no_version_of_it() -> None:
    assert _C.cuda_driver_version() == 0


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="this build has no CUDA kernels")
def test_workspaces_grow_with_segments_and_elements() -> None:
    sizes = [_C.cuda_norm_workspace_bytes(*facts) for facts in ((0, 0), (1, 1), (100, 100), (100, 10**7))]
    assert sizes[0] >= 0
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] < sizes[3]


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="this build has no CUDA kernels")
def test_only_steps_that_sum_squares_need_more_for_more_elements() -> None:
    few, many = ({name: _C.cuda_step_workspace_bytes(name, 100, numel) for name in KERNELS} for numel in (100, 10**7))
    assert {name for name in KERNELS if many[name] > few[name]} == {"lamb_moments"}
    assert max(few.values()) < 16_000
    with pytest.raises(ValueError, match="there is no optimizer's kernel sgdw"):
        _C.cuda_step_workspace_bytes("sgdw", 1, 1)


@pytest.mark.skipif(_C.build_info()["cuda"], reason="this build has the CUDA kernels")
def test_driver_of_missing_kernels_says_how_to_get_them() -> None:
    with pytest.raises(KernelUnavailableError, match="ZEROOPT_CUDA=on pip install"):
        _C.cuda_driver_version()


@pytest.mark.skipif(_C.build_info()["cuda"], reason="this build has the CUDA kernels")
def test_workspace_of_missing_kernels_says_how_to_get_them() -> None:
    with pytest.raises(KernelUnavailableError, match="ZEROOPT_CUDA=on pip install"):
        _C.cuda_norm_workspace_bytes(1, 1)
    with pytest.raises(KernelUnavailableError, match="ZEROOPT_CUDA=on pip install"):
        _C.cuda_step_workspace_bytes("sgd", 1, 1)


def test_unknown_dtype_code() -> None:
    with pytest.raises(ValueError, match="there is no dtype code 9"):
        _C.pack(0, 9, 0, 0, 0, 1.0, 1)


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
CMAKE_FOLDER = ROOT / "cmake"
CUDA_VARIABLES = ("ZEROOPT_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST")


def run_cmake(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    others = {
        name: value for name, value in os.environ.items() if name not in (*CUDA_VARIABLES, "CMAKE_CUDA_ARCHITECTURES")
    }
    command = [str(shutil.which("cmake")), *arguments]
    return subprocess.run(command, cwd=folder, env=others | environment, capture_output=True, text=True, check=False)


@needs_cmake
class TestBrokenCudaCompiler:
    """What cmake/cuda.cmake makes of a compiler that is there and does not compile."""

    def configure(self, folder: Path, nvcc: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A project of nothing but that file."""
        (folder / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.24)\nproject(empty LANGUAGES NONE)\n"
            f'include({CMAKE_FOLDER}/cuda.cmake)\nmessage(STATUS "with CUDA: ${{ZEROOPT_WITH_CUDA}}")\n'
            'message(STATUS "problem: ${ZEROOPT_CUDA_PROBLEM}.")\n'
        )
        (folder / "bin").mkdir()
        (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (folder / "bin" / "nvcc").chmod(0o755)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return run_cmake(folder, "-S", ".", "-B", "build", **{"PATH": path, **environment})

    REFUSING = "echo 'error: unsupported GNU version' >&2; exit 1"

    @pytest.mark.parametrize(
        ("nvcc", "reason"),
        [
            (REFUSING, "error: unsupported GNU version"),
            ("exit 3", "it ends with code 3"),
            ("echo 'sh: 1: ptxas: not found' >&2; exit 127", "it ends with code 127: sh: 1: ptxas: not found"),
            ("exit 0", "it compiles, but not what CMake tries"),
        ],
    )
    def test_auto_does_without_and_says_why(self, tmp_path: Path, nvcc: str, reason: str) -> None:
        result = self.configure(tmp_path, nvcc)
        assert result.returncode == 0, result.stderr
        assert f"CPU kernels only: {tmp_path}/bin/nvcc does not work: {reason} (" in result.stdout
        assert "with CUDA: 0" in result.stdout
        assert f"problem: when it was built, {tmp_path}/bin/nvcc does not work: {reason}." in result.stdout

    def test_on_is_an_error_that_says_why(self, tmp_path: Path) -> None:
        result = self.configure(tmp_path, self.REFUSING, ZEROOPT_CUDA="on")
        assert result.returncode != 0
        assert "ZEROOPT_CUDA=on, but" in result.stderr
        assert f"{tmp_path}/bin/nvcc does not work: error: unsupported GNU version" in result.stderr

    def test_a_compiler_that_is_not_there(self, tmp_path: Path) -> None:
        result = self.configure(tmp_path, self.REFUSING, CUDACXX="/nowhere/nvcc")
        assert result.returncode == 0, result.stderr
        assert "CPU kernels only: /nowhere/nvcc does not work: No such file or directory" in result.stdout

    def test_one_of_an_old_cuda_is_not_tried(self, tmp_path: Path) -> None:
        result = self.configure(tmp_path, "echo 'Cuda compilation tools, release 11.5, V11.5.119'")
        problem = f"{tmp_path}/bin/nvcc is of CUDA 11.5, and kernels need 11.8 or newer"
        assert result.returncode == 0, result.stderr
        assert f"CPU kernels only: {problem}" in result.stdout
        assert f"problem: when it was built, {problem}." in result.stdout
        assert "Trying the CUDA compiler" not in result.stdout

    def test_off_looks_for_none(self, tmp_path: Path) -> None:
        result = self.configure(tmp_path, "touch called; exit 1", ZEROOPT_CUDA="off")
        assert result.returncode == 0 and not (tmp_path / "called").exists()


@needs_cmake
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ""),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}, "80-real;90"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5;12.0a"}, "75-real;120a-real"),
        ({"TORCH_CUDA_ARCH_LIST": ""}, ""),
        ({"TORCH_CUDA_ARCH_LIST": " "}, ""),
        ({"CUDAARCHS": "", "TORCH_CUDA_ARCH_LIST": "8.6"}, "86-real"),
        ({"CUDAARCHS": "90", "TORCH_CUDA_ARCH_LIST": "8.6"}, "90"),
        ({"CMAKE_CUDA_ARCHITECTURES": "", "CUDAARCHS": "75;80-real"}, "75;80-real"),
    ],
)
def test_architectures_that_are_asked_for(environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    """An empty variable is as good as none."""
    script = f'include({CMAKE_FOLDER}/cuda_archs.cmake)\nzeroopt_asked_archs(archs)\nmessage("archs: ${{archs}}.")\n'
    (tmp_path / "script.cmake").write_text(script)
    result = run_cmake(tmp_path, "-P", "script.cmake", **environment)
    assert f"archs: {expected}." in result.stderr, result


@needs_cmake
@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("90-real", ["compute_90,code=[sm_90]"]),
        (
            "75-real;80-real;86-real;90-real;100-real;120",
            ["compute_75,code=[sm_75,sm_80,sm_86,sm_90]", "compute_100,code=[sm_100,sm_120,compute_100]"],
        ),
        ("90;80", ["compute_80,code=[sm_80,compute_80,sm_90]"]),
        ("80-virtual;90a-real;90", ["compute_80,code=[compute_80,sm_90]", "compute_90a,code=[sm_90a]"]),
        ("native", []),
    ],
)
def test_ptx_is_made_once_for_gpus_that_have_it_alike(archs: str, expected: list[str], tmp_path: Path) -> None:
    call = f'zeroopt_generate_code("{archs}" code)\nmessage("${{code}}.")\n'
    script = f"cmake_minimum_required(VERSION 3.24)\ninclude({CMAKE_FOLDER}/cuda_archs.cmake)\n{call}"
    (tmp_path / "script.cmake").write_text(script)
    result = run_cmake(tmp_path, "-P", "script.cmake")
    assert result.stderr.strip() == ";".join(f"--generate-code=arch={one}" for one in expected) + ".", result


@needs_cmake
def test_an_architecture_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "script.cmake").write_text(f"include({CMAKE_FOLDER}/cuda_archs.cmake)\nzeroopt_asked_archs(archs)\n")
    result = run_cmake(tmp_path, "-P", "script.cmake", TORCH_CUDA_ARCH_LIST="Hopper")
    assert result.returncode != 0 and 'got "Hopper"' in " ".join(result.stderr.split())


@needs_cmake
@pytest.mark.parametrize(
    ("facts", "unfit"),
    [
        ({"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SIZEOF_VOID_P": "8"}, None),
        ({"CMAKE_SYSTEM_NAME": "Darwin", "CMAKE_SIZEOF_VOID_P": "8"}, "Darwin"),
        ({"CMAKE_SYSTEM_NAME": "Windows", "CMAKE_SIZEOF_VOID_P": "8"}, "Windows"),
        ({"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SIZEOF_VOID_P": "4"}, "32 bits"),
        (
            {
                "CMAKE_SYSTEM_NAME": "Linux",
                "CMAKE_SIZEOF_VOID_P": "8",
                "CMAKE_CXX_BYTE_ORDER": "BIG_ENDIAN",
                "CMAKE_SYSTEM_PROCESSOR": "s390x",
            },
            "a big-endian processor, s390x",
        ),
    ],
)
def test_systems_that_it_could_not_run_on(facts: dict[str, str], unfit: str | None, tmp_path: Path) -> None:
    arguments = [f"-D{name}={value}" for name, value in facts.items()]
    result = run_cmake(tmp_path, *arguments, "-P", str(CMAKE_FOLDER / "system.cmake"))
    told = " ".join(result.stderr.split())
    assert (result.returncode == 0) is (unfit is None), told
    assert unfit is None or f"on a 64-bit little-endian processor, and this is a build for {unfit}. On macOS" in told


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_a_source_distribution_has_what_is_tracked() -> None:
    """Tests with their helpers, benchmarks, examples and documents: all but what only git reads."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    folders = {"zeroopt", *(line[1] for line in lines if line[0] == "graft")}
    files = {
        "MANIFEST.in",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }  # which setuptools takes unasked, like the package
    files |= {name for line in lines if line[0] == "include" for name in line[1:]}
    assert [f for f in tracked if f.split("/")[0] not in folders and f not in files] == [".gitignore"]
