"""Bytes count from the making of a storage until nobody refers to it, once however many tensors share it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zeroopt.planner.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_count_while_they_live(device: str) -> None:
    with LiveBytes() as live:
        one = torch.zeros(1024, device=device)
        assert live.now == 4096
        view = one.view(32, 32)[1:]
        assert live.now == 4096
        two = one + 1
        del one
        assert live.now == 2 * 4096  # the view keeps it
        del view
        assert (live.now, live.most) == (4096, 2 * 4096)
        del two
    assert live.now == 0


def test_what_was_there_before_does_not_count_and_sizes_are_rounded_up() -> None:
    before = torch.zeros(1000)
    with LiveBytes([before], granule=512) as live:
        before.add_(1)
        kept = before[:10] * 2
    assert live.now == 512
    del kept


def test_a_peak_is_looked_for_anew() -> None:
    with LiveBytes() as live:
        torch.zeros(1024)
        kept = torch.zeros(16)
        assert live.restart() == 4096
        assert live.most == 64
    del kept


def test_fake_tensors_count_as_real_ones_do() -> None:
    def train() -> int:
        with LiveBytes() as live:
            x = torch.zeros(64, 64, requires_grad=True)
            (x.sin() * x.cos()).sum().backward()
        return live.most

    with FakeTensorMode():
        faked = train()
    assert faked == train() > 4 * 64 * 64 * 4
