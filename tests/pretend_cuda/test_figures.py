"""What a step tells a device, in numbers: the host waits for nothing, and what it uploads does not depend on the model."""

from __future__ import annotations

from typing import Any

import pytest

from .process import PretendProcess
from .test_training import LOOPS
from .training import Loop, Trainer, train

pytestmark = pytest.mark.slow

HOST_WAITS = {"stage 2, GradScaler": 2, "stage 2, GradScaler and clipping": 2}  # what ranks agree on, and torch; else 0
STEADY = [name for name, loop in LOOPS.items() if not loop.side and loop.options.get("fused", True)]


def _figures_of(loop: Loop) -> dict[str, Any]:
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> None:
        train(loop, rank.number, rank.device, rank.recorded)

    _, recording = on_ranks(2, run)
    return vars(recording.figures(0))


@pytest.mark.parametrize("name", STEADY)
def test_the_host_waits_for_nothing_in_a_step(name: str, on_pretend_cuda: PretendProcess) -> None:
    host_waits = on_pretend_cuda(_figures_of, LOOPS[name])["host_waits"]
    assert sum(host_waits.values()) == HOST_WAITS.get(name, 0), host_waits


def _count_another_step() -> list[str]:
    from zeroopt.errors import CollectiveError

    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> list[str]:
        trainer = Trainer(Loop({"stage": 2}, warm_up=1, steps=3), rank.number, rank.device)
        trainer.step()
        trainer.optimizer.replica.reducer.num_steps += rank.number  # as if one rank had taken one more
        seen = []
        for _ in range(2):
            try:
                trainer.step()
                seen.append("")
            except CollectiveError as error:
                seen.append(str(error))
        return seen

    return on_ranks(2, run)[0][0]


def test_ranks_that_diverge_hear_of_it_one_backward_later(on_pretend_cuda: PretendProcess) -> None:
    first, second = on_pretend_cuda(_count_another_step)
    assert first == ""
    assert "the ranks have diverged" in second
