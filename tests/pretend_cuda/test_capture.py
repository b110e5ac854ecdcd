"""Forward, backward and step while a CUDA graph is captured: nothing of it touches the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .process import PretendProcess
from .training import BF16, Loop, Trainer

pytestmark = pytest.mark.slow

LOOPS = {
    "stage 0": Loop({"stage": 0}),
    "stage 1": Loop({"stage": 1}),
    "stage 2": Loop({"stage": 2}),
    "stage 2, accumulated": Loop({"stage": 2}, accumulate=2),
    "stage 2, no_sync": Loop({"stage": 2}, accumulate=2, no_sync=True),
    "stage 2, max_grad_norm": Loop({"stage": 2, "max_grad_norm": 0.1}),
    "stage 2, bfloat16": Loop({"stage": 2, **BF16}),
    "stage 1, 8 bits": Loop({"stage": 1, **BF16, "master_weights": "remainder", "state_dtype": torch.int8}),
}


def _capture(loop: Loop, size: int) -> None:
    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> Any:
        trainer = Trainer(loop, rank.number, rank.device)
        for _ in range(loop.warm_up):
            trainer.step()
        with capturing(rank.device):
            trainer.step()

    on_ranks(size, run)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", LOOPS)
def test_a_step_can_be_captured(name: str, size: int, on_pretend_cuda: PretendProcess) -> None:
    on_pretend_cuda(_capture, LOOPS[name], size)


def _look_at_the_host() -> str:
    import torch

    from .surface import capturing

    with capturing(0):
        try:
            torch.ones(3, device="cuda").sum().item()
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_what_makes_the_host_wait_is_refused_in_a_capture(on_pretend_cuda: PretendProcess) -> None:
    assert "operation not permitted when stream is capturing" in on_pretend_cuda(_look_at_the_host)
