"""What a host is told of a device that it runs ahead of."""

from __future__ import annotations

import pytest
import torch

from .process import PretendProcess

pytestmark = pytest.mark.slow


def _ask() -> list[bool]:
    """Whether an event has come, as the host is told: that was never recorded; recorded, before and after the host has waited for what is
    behind it; and once more where the host is not ahead."""
    from .ranks import Rank, on_ranks
    from .surface import host_is_ahead

    def run(rank: Rank) -> list[bool]:
        event = torch.cuda.Event()
        with rank.recorded(), host_is_ahead():
            found = [event.query()]
            torch.ones(3, device=rank.device)
            event.record()
            found.append(event.query())
            torch.cuda.synchronize()
            found.append(event.query())
        return [*found, event.query()]

    return on_ranks(1, run)[0][0]


def test_an_event_has_come_when_the_host_has_waited_for_what_is_behind_it(on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_ask) == [True, False, True, True]


def _numbers_of_captures() -> list[tuple[bool, int, int]]:
    """As zeroopt is told by torch and the driver: whether a stream is captured and in which capture, and in which a fork of it is; before,
    in two captures, and after."""
    from zeroopt.streams import capture_number, is_capturing

    from .surface import capturing

    device, fork = torch.device("cuda", 0), torch.cuda.Stream()

    def look() -> tuple[bool, int, int]:
        with torch.cuda.stream(fork):
            number = capture_number(device)
            return is_capturing(device), number, number

    found = [look()]
    for _ in range(2):
        with capturing(0):
            fork.wait_stream(torch.cuda.current_stream())
            found.append((is_capturing(device), capture_number(device), look()[1]))
            torch.cuda.current_stream().wait_stream(fork)
    return [*found, look()]


def test_captures_have_numbers(on_pretend_cuda: PretendProcess) -> None:
    before, first, second, after = on_pretend_cuda(_numbers_of_captures)
    assert before == after == (False, 0, 0)
    for is_on, number, of_fork in (first, second):
        assert is_on and number == of_fork > 0
    assert first[1] != second[1]
