"""What a bug report needs to know: the build of the kernels, the versions around it, and the machine."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .._C import build_info
from ..errors import KernelUnavailableError
from ..ops.devices import check_launch, describe_driver, missing_kernels

if TYPE_CHECKING:
    from .._C import BuildInfo

_BASELINES = {"x86_64": "SSE2", "aarch64": "NEON"}
"""What every processor of a kind has, for which generic kernels are compiled."""
_NO_OPENMP = (
    "no: CPU kernels run on one thread. Torch has no runtime that could be shared, and there is no libgomp.so.1: "
    "install libgomp1 (Debian, Ubuntu) or libgomp (Fedora, RHEL, conda)"
)


def environment() -> dict[str, str]:
    """Facts of this installation and machine, by name. Not collective."""
    build = build_info()
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    problems = {str(device): problem for device in devices if (problem := _problem_of(device)) is not None}
    return {
        "zeroopt": build["version"],
        "compiler": f"{build['compiler']}, {build['flags']}",
        "CPU kernels": f"{_registers(build['isa'])} (compiled: {', '.join(map(_registers, build['isas']))})",
        "OpenMP": build["openmp"] or _NO_OPENMP,
        "CUDA kernels": _cuda_kernels(build),
        "CUDA driver": describe_driver() if build["cuda"] else "not asked, without CUDA kernels",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "no",
        "CUDA devices": ", ".join(map(_name_of, devices)) or "none",
        **problems,
        "backends": ", ".join(_backends()) or "none",
        "platform": platform.platform(),
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
    }


def _registers(isa: str) -> str:
    """An instruction set, with what generic means on this processor."""
    baseline = _BASELINES.get(platform.machine())
    return f"{isa}/{baseline}" if isa == "generic" and baseline else isa


def _cuda_kernels(build: BuildInfo) -> str:
    """For which architectures, or why there are none and what to do about it."""
    if build["cuda"]:
        return f"{build['cuda_version']} ({' '.join(build['cuda_archs'])})"
    return (
        f"none: {build['cuda_problem']}. To have them, reinstall with ZEROOPT_CUDA=on where nvcc works, or from a wheel whose version "
        "ends in +cu and a number"
    )


def _name_of(device: torch.device) -> str:
    """With its compute capability."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def _problem_of(device: torch.device) -> str | None:
    """Why kernels do not run on a CUDA device; None where they do."""
    missing = missing_kernels(device)
    if missing is not None:
        return f"torch's operations instead of kernels: {missing}"
    try:
        check_launch(device)
    except KernelUnavailableError as error:
        return str(error)
    return None


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, available in found.items() if available]


def print_environment() -> None:
    """Print `environment` as a table."""
    facts = environment()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
