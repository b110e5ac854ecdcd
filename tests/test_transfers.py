"""Numbers go to a device and back as they are, whether torch has pinned memory for it or not."""

from __future__ import annotations

from unittest.mock import Mock, patch

import pytest
import torch

from zeroopt.transfers import Download, Uploaded, pins_for


@pytest.mark.parametrize(
    ("device", "accelerator", "expected"),
    [("cuda", None, True), ("xpu", None, False), ("xpu", False, False), ("xpu", True, True), ("cpu", True, False)],
)
def test_torch_pins_for_cuda_and_newer_ones_for_their_accelerator(
    device: str, accelerator: bool | None, expected: bool
) -> None:
    """None: torch has no such module."""
    module = None if accelerator is None else Mock(is_available=lambda: accelerator)
    with patch.object(torch, "accelerator", module, create=True):
        assert pins_for(torch.device(device)) is expected


def test_the_cpu_takes_values_as_they_are() -> None:
    values = torch.arange(3.0)
    assert Uploaded(torch.device("cpu")).hold(values) is values
    assert Download(values).read() is values
