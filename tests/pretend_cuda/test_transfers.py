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
