"""Which devices parameters may be on. Modules that torch does not have here are made up."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zeroopt import ops
from zeroopt.admission import devices
from zeroopt.admission.devices import check_device, check_stepped_on, describe_device, warn_of_missing_kernels
from zeroopt.errors import KernelUnavailableError, NotSupportedError
from zeroopt.optim import FusedLion

CUDA = torch.device("cuda:1")
XPU = torch.device("xpu:0")
ALL: dict[str, Any] = {"Stream": object, "Event": object, "stream": object, "current_stream": object}


def torch_has(monkeypatch: pytest.MonkeyPatch, module: dict[str, Any], *, float64: bool = True) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**module))
    monkeypatch.setattr(devices, "_has_float64", lambda device: float64)


def test_the_cpu_needs_nothing() -> None:
    check_device(torch.device("cpu"))


@pytest.mark.parametrize("has_kernels", [False, True])
def test_on_cuda_kernels_are_tried_where_there_are_some(monkeypatch: pytest.MonkeyPatch, has_kernels: bool) -> None:
    tried: list[torch.device] = []
    monkeypatch.setattr(ops, "has_kernels", lambda device: has_kernels)
    monkeypatch.setattr(devices, "check_launch", tried.append)
    check_device(CUDA)
    assert tried == ([CUDA] if has_kernels else [])


def test_one_that_torch_has_streams_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_has(monkeypatch, ALL)
    check_device(XPU)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_has(monkeypatch, {"Event": object, "stream": object})
    with pytest.raises(
        NotSupportedError, match=r"on xpu:0, for which this torch lacks torch\.xpu\.Stream, torch\.xpu\.current_stream;"
    ):
        check_device(XPU)
    torch_has(monkeypatch, ALL, float64=False)
    with pytest.raises(NotSupportedError, match="lacks float64"):
        check_device(XPU)


def test_a_device_without_a_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("Invalid device module")

    monkeypatch.setattr(torch, "get_device_module", refuse)
    with pytest.raises(NotSupportedError, match="of which torch knows no module: Invalid device module"):
        check_device(torch.device("hpu"))


def test_float64_is_tried() -> None:
    assert devices._has_float64(torch.device("cpu"))


def test_optimizers_that_step_by_a_kernel_alone_are_refused_where_there_is_none() -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    check_stepped_on(FusedLion(params), torch.device("cpu"))
    check_stepped_on(torch.optim.AdamW(params), XPU)
    with pytest.raises(KernelUnavailableError) as error:
        check_stepped_on(FusedLion(params), XPU)
    assert str(error.value) == (
        "FusedLion steps by a fused kernel, and there is none for xpu:0: zeroopt has kernels for the CPU and CUDA, and none for "
        "xpu. Or take an optimizer of torch.optim, which steps by itself"
    )


def test_ranks_compare_whether_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = describe_device(XPU), describe_device(torch.device("cpu"))
    assert len(set(with_kernels)) == 2


def test_what_goes_without_kernels_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "zeroopt"):
        warn_of_missing_kernels(torch.device("cpu"))
        assert caplog.messages == []
        warn_of_missing_kernels(XPU)
    (message,) = caplog.messages
    assert message.startswith("what runs on xpu:0 goes by torch's operations") and ops.missing_kernels(XPU) in message
