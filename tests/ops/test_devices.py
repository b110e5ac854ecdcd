"""For which devices there are kernels, by what was built and what the device is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from zeroopt import _C, KernelUnavailableError
from zeroopt.ops import devices
from zeroopt.ops.devices import has_kernels, missing_kernels, require_kernels

CUDA = torch.device("cuda:1")

Built = Callable[..., None]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Built]:
    """Lets the build be of some architectures, and every CUDA device of one compute capability."""

    def build(archs: str, capability: tuple[int, int] = (9, 0)) -> None:
        facts: dict[str, Any] = {"cuda": bool(archs), "cuda_version": "13.0.88", "cuda_archs": archs.split()}
        monkeypatch.setattr(_C, "build_info", lambda: facts)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        missing_kernels.cache_clear()

    yield build
    missing_kernels.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_cpu_always_has_them(built: Built, device: str) -> None:
    built("")
    assert has_kernels(torch.device(device))
    require_kernels(torch.device(device))


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("75-real 80-real 120", (8, 0), True),
        ("75-real 80-real 120", (8, 9), True),  # later ones of the same major version
        ("86-real", (8, 0), False),
        ("75-real 80-real 120", (9, 0), False),
        ("75-real 80-real 90", (10, 3), True),  # by PTX
        ("75-real 80-real 90-virtual", (10, 0), True),
        ("100-virtual", (9, 0), False),
        ("75-real 80-real 120", (7, 0), False),
        ("sm_90", (9, 0), True),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
    ],
)
def test_what_was_compiled_runs_where_cuda_says(
    built: Built, archs: str, capability: tuple[int, int], runs: bool
) -> None:
    built(archs, capability)
    assert has_kernels(CUDA) is runs


def test_a_build_without_cuda_says_how_to_get_it(built: Built) -> None:
    built("")
    with pytest.raises(
        KernelUnavailableError, match=r"tensors on cuda:1: zeroopt was built without CUDA: .*ZEROOPT_CUDA=on"
    ):
        require_kernels(CUDA)


def test_an_architecture_that_was_not_built_is_named(built: Built) -> None:
    built("75-real 80-real 120", (7, 0))
    assert missing_kernels(CUDA) == (
        "zeroopt was built by CUDA 13.0.88 for the architectures 75-real, 80-real, 120, and cuda:1 is of 70: reinstall it with "
        "TORCH_CUDA_ARCH_LIST=7.0, by an nvcc that knows it (that of CUDA 13 knows none before 75)"
    )


def test_rocm_goes_by_the_name_of_cuda_and_has_none(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built("90")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert missing_kernels(CUDA) == "zeroopt has kernels for CUDA, and this torch is one for ROCm"


def test_other_devices_have_none(built: Built) -> None:
    built("90")
    assert missing_kernels(torch.device("xpu:0")) == "zeroopt has kernels for the CPU and CUDA, and none for xpu"
    assert devices.missing_kernels.cache_info().currsize == 1
