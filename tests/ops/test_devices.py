"""For which devices there are kernels, by what was built and what the device is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zeroopt import _C, KernelUnavailableError
from zeroopt.ops import devices
from zeroopt.ops.devices import check_launch, has_kernels, missing_kernels, require_kernels

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


class Launches:
    """Stands for what the module says of launches, which this machine may have no driver for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, problem: str | None, driver: int) -> None:
        self.streams: list[int] = []
        self._problem = problem
        monkeypatch.setattr(_C, "cuda_try_launch", self.launch)
        monkeypatch.setattr(_C, "cuda_driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=17))

    def launch(self, stream: int) -> None:
        self.streams.append(stream)
        if self._problem is not None:
            raise RuntimeError(self._problem)


def test_a_launch_that_succeeds_goes_to_the_current_stream(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built("90-real")
    launches = Launches(monkeypatch, None, 13000)
    check_launch(CUDA)
    assert launches.streams == [17]


@pytest.mark.parametrize(("driver", "says"), [(12040, "the driver serves CUDA up to 12.4"), (0, "there is no driver")])
def test_a_driver_that_is_too_old_is_told_from_the_build(
    built: Built, monkeypatch: pytest.MonkeyPatch, driver: int, says: str
) -> None:
    built("90-real")
    Launches(
        monkeypatch, "CUDA kernel try_launch: CUDA driver version is insufficient for CUDA runtime version", driver
    )
    with pytest.raises(KernelUnavailableError) as error:
        check_launch(CUDA)
    assert str(error.value) == (
        "no kernel can be launched on cuda:1: CUDA kernel try_launch: CUDA driver version is insufficient for CUDA runtime "
        f"version. zeroopt was built by CUDA 13.0.88, and {says}: update the driver, or reinstall zeroopt by the nvcc of a CUDA "
        "that it serves (or with ZEROOPT_CUDA=off, to train by torch's operations)"
    )


def test_rocm_goes_by_the_name_of_cuda_and_has_none(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built("90")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert missing_kernels(CUDA) == "zeroopt has kernels for CUDA, and this torch is one for ROCm"


def test_other_devices_have_none(built: Built) -> None:
    built("90")
    assert missing_kernels(torch.device("xpu:0")) == "zeroopt has kernels for the CPU and CUDA, and none for xpu"
    assert devices.missing_kernels.cache_info().currsize == 1
