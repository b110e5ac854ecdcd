"""For which devices this build has kernels. On others, what moves data goes by torch's operations, and optimizers step by themselves."""

from __future__ import annotations

from functools import cache

import torch

from .. import _C
from ..errors import KernelUnavailableError


@cache
def missing_kernels(device: torch.device) -> str | None:
    """Why there are no kernels for a device, and what to do about it; None where there are. Not collective."""
    if device.type in ("cpu", "meta"):  # what is on the meta device is planned for one with kernels
        return None
    if device.type != "cuda":
        return f"zeroopt has kernels for the CPU and CUDA, and none for {device.type}"
    if torch.version.hip is not None:
        return "zeroopt has kernels for CUDA, and this torch is one for ROCm"
    build = _C.build_info()
    if not build["cuda"]:
        return "zeroopt was built without CUDA: reinstall it where nvcc is found, with ZEROOPT_CUDA=on to be told why if that fails"
    major, minor = torch.cuda.get_device_capability(device)
    if not any(_runs_on(arch, major, minor) for arch in build["cuda_archs"]):
        return (
            f"zeroopt was built by CUDA {build['cuda_version']} for the architectures {', '.join(build['cuda_archs'])}, and "
            f"{device} is of {major}{minor}: reinstall it with TORCH_CUDA_ARCH_LIST={major}.{minor}, by an nvcc that knows it "
            "(that of CUDA 13 knows none before 75)"
        )
    return None


def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for tensors on a device."""
    return missing_kernels(device) is None


def require_kernels(device: torch.device) -> None:
    """Raise KernelUnavailableError where there are no kernels for a device, and what they do is done by nothing else."""
    missing = missing_kernels(device)
    if missing is not None:
        raise KernelUnavailableError(f"there is no kernel for tensors on {device}: {missing}")


def check_launch(device: torch.device) -> None:
    """Launch a kernel that does nothing, on a CUDA device that has kernels. Not collective; waits for nothing.

    Raises:
        KernelUnavailableError: none can be launched; the driver is too old, say.
    """
    try:
        with torch.cuda.device(device):
            _C.cuda_try_launch(torch.cuda.current_stream(device).cuda_stream)
    except RuntimeError as error:
        raise KernelUnavailableError(
            f"no kernel can be launched on {device}: {error}. zeroopt was built by CUDA {_C.build_info()['cuda_version']}, and "
            f"{describe_driver()}: update the driver, or reinstall zeroopt by the nvcc of a CUDA that it serves (or with "
            "ZEROOPT_CUDA=off, to train by torch's operations)"
        ) from error


def describe_driver() -> str:
    """What CUDA's driver serves. For builds with CUDA kernels."""
    version = _C.cuda_driver_version()
    return f"the driver serves CUDA up to {version // 1000}.{version % 1000 // 10}" if version else "there is no driver"


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether what was compiled for an architecture, in CMake's notation, runs on a device of that compute capability.

    Machine code ("90-real") does on later ones of the same major version, PTX ("90-virtual") on all later ones, and "90" is both.
    Letters ("90a") tie either to that version.
    """
    number, _, kind = arch.removeprefix("sm_").partition("-")
    wanted = (int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1]))
    if not number.isdigit():
        return wanted == (major, minor) if number.endswith("a") else wanted[0] == major and wanted[1] <= minor
    return (kind != "virtual" and wanted[0] == major and wanted[1] <= minor) or (
        kind != "real" and wanted <= (major, minor)
    )
