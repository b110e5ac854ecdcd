"""What the build says of itself, and what becomes of kernels that are not in it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from zeroopt import _C
from zeroopt.env import environment
from zeroopt.errors import KernelUnavailableError

# rows, active, steps, squares, count, three formats, groups, three scalars, seed, total_numel, workspace, stream
STEP = (64, 64, 64, 64, 1, 0, 0, 0, 64, 0, 0, 0, 0, 4, 64, 0)
CUDA_CALLS = {
    "cuda_pack": (64, 0, 128, 0, 4, 1.0, 0),
    "cuda_pack_segments": (64, 64, 1, 0, 0, 1.0, 4, 64, 0),
    "cuda_reduce": (64, 1, 0, 0, 128, 0, 4, 0),
    "cuda_quantize": (64, 128, 192, 4, True, 0),
    "cuda_dequantize": (64, 128, 192, 4, True, 0),
    "cuda_squared_norms": (64, 64, 64, 1, 0, 64, 4, 64, 0),
    "cuda_adamw": STEP,
    "cuda_sgd": STEP,
    "cuda_adagrad": STEP,
    "cuda_lion": STEP,
    "cuda_lamb_moments": STEP,
    "cuda_lamb_update": STEP,
}


def test_build_info_is_complete() -> None:
    build = _C.build_info()
    assert build["version"] == version("zeroopt")
    assert build["compiler"].split()[1][0].isdigit()
    assert "-ffp-contract=off" in build["flags"] or "GNU" not in build["compiler"]
    assert build["isa"] == _C.cpu_isa()
    assert isinstance(build["openmp"], bool)
    assert build["cuda"] == bool(build["cuda_version"]) == bool(build["cuda_archs"])


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
    assert {name for name in dir(_C) if name.startswith("cuda_")} == {*CUDA_CALLS, "cuda_workspace_bytes"}


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="this build has no CUDA kernels")
def test_workspaces_grow_with_segments_and_elements() -> None:
    sizes = [_C.cuda_workspace_bytes(*facts) for facts in ((0, 0), (1, 1), (100, 100), (100, 10**7))]
    assert sizes[0] >= 0
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] < sizes[3]


@pytest.mark.skipif(_C.build_info()["cuda"], reason="this build has the CUDA kernels")
def test_workspace_of_missing_kernels_says_how_to_get_them() -> None:
    with pytest.raises(KernelUnavailableError, match="ZEROOPT_CUDA=on pip install"):
        _C.cuda_workspace_bytes(1, 1)


def test_unknown_dtype_code() -> None:
    with pytest.raises(ValueError, match="there is no dtype code 9"):
        _C.pack(0, 9, 0, 0, 0, 1.0, 1)


def test_env_command_prints_every_fact() -> None:
    command = [sys.executable, "-m", "zeroopt", "env"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, value in environment().items():
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"{name} "))
        assert name == "cores" or line.endswith(value)
