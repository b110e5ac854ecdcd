"""Numbers go to a device and come back, with and without pinned memory."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from zeroopt import transfers

from .process import PretendProcess

pytestmark = pytest.mark.slow


def _there_and_back(pins: bool) -> tuple[list[list[float]], dict[str, Any]]:
    """What comes back of what is sent, changed at once and sent again; and figures."""
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> list[list[float]]:
        with rank.recorded():
            uploaded = transfers.Uploaded(rank.device)
            values = torch.arange(3.0)
            first = transfers.Download(uploaded.hold(values))
            second = transfers.Download(uploaded.hold(values + 1))
            return [first.read().tolist(), second.read().tolist()]

    with patch.object(transfers, "pins_for", lambda _: pins):
        values, recording = on_ranks(1, run)
    assert not recording.races()
    return values[0], vars(recording.figures(0))


@pytest.mark.parametrize("pins", [True, False])
def test_the_host_waits_where_there_is_no_pinned_memory(pins: bool, on_pretend_cuda: PretendProcess) -> None:
    values, figures = on_pretend_cuda(_there_and_back, pins)
    assert values == [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]
    assert figures["uploads"] == 2
    assert bool(figures["host_waits"]) is not pins


def _copy_pageable_memory() -> tuple[list[list[float]], int]:
    """What comes of values that are copied to the device and changed, and of that on the host, all with `non_blocking`; and how often the
    host has waited."""
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> list[list[float]]:
        with rank.recorded():
            values = torch.arange(3.0)
            there = values.to(rank.device, non_blocking=True)
            values += 1
            here = torch.empty(3).copy_(there, non_blocking=True)
            return [here.tolist(), there.cpu().tolist()]

    values, recording = on_ranks(1, run)
    return values[0], recording.figures(0).host_waits.total()


def test_pageable_memory_is_staged_on_the_way_there_and_awaited_on_the_way_back(
    on_pretend_cuda: PretendProcess,
) -> None:
    values, waits = on_pretend_cuda(_copy_pageable_memory)
    assert values == [[0.0, 1.0, 2.0]] * 2
    assert waits == 2  # for the two copies to the host
