"""Signals that announce the end, answered by all ranks after the same step."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch.distributed as dist
from worker_pool import RunOnRanks

from zeroopt.checkpoint import StopRequest
from zeroopt.errors import ConfigError


def steps_until_all_stop(victim: int) -> tuple[int, bool]:
    """After how many steps this rank stops, and whether the former handler is there again."""
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest([signal.SIGTERM, signal.SIGUSR2]) as stop:
        step = 0
        while not stop.came():
            step += 1
            if step == 3 and dist.get_rank() == victim:
                os.kill(os.getpid(), signal.SIGUSR2 if victim else signal.SIGTERM)
        assert stop.came()
    return step, signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("victim", [0, 1])
def test_all_ranks_stop_after_the_same_step(run_on_ranks: RunOnRanks, victim: int) -> None:
    assert run_on_ranks(2, steps_until_all_stop, victim) == [(3, True)] * 2


def test_it_is_refused_in_another_thread() -> None:
    raised: list[Exception] = []

    def make() -> None:
        try:
            StopRequest()
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "in the main thread" in str(raised[0])
