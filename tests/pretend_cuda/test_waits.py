"""Every wait of a stream in zeroopt is there for a reason: leave one out, and there is a race, and an order that gives other bits."""

from __future__ import annotations

import pytest

from .process import PretendProcess
from .training import BF16, Loop, train

pytestmark = pytest.mark.slow

LOOPS = {
    "stage 0": Loop({"stage": 0}, side="average"),
    # A feature looks at sums, so the last gather begins behind what ranks say of used parameters, whose wait does not cover it.
    "stage 0, max_grad_norm": Loop({"stage": 0, "max_grad_norm": 0.1}),
    "stage 1, reduce_dtype": Loop({"stage": 1, "reduce_dtype": BF16["param_dtype"]}, accumulate=2, side="average"),
    "stage 2": Loop({"stage": 2}, side="average"),
    "stage 2, several streams": Loop({"stage": 2}, side="branch"),
    "stage 2, several streams in one bucket": Loop(
        {"stage": 2, "bucket_mb": 0.02}, accumulate=2, no_sync=True, side="branch"
    ),
    "stage 2, bfloat16": Loop({"stage": 2, **BF16, "max_grad_norm": 0.1}, accumulate=2),
    "stage 2, GradScaler and clipping": Loop({"stage": 2}, scaler=True, clip=0.1),
    "stage 2, no overlap": Loop({"stage": 2, "overlap": False}),
}
NUM_ORDERS = 40

# What makes the host wait by itself: a copy of pageable memory, a number that is asked for. And the host's waits for an event: what
# it reads then is not recorded; too early, it would have read the wrong values when this was recorded.
_OF_THE_HOST = ("copy ", "aten::", "Event.")


def _leave_out_each_wait(loop: Loop, num_orders: int) -> dict[str, tuple[int, int]]:
    """By the lines of each wait of zeroopt: races without it, and orders that give other bits."""
    from .ranks import on_ranks
    from .surface import host_is_ahead

    with host_is_ahead():
        _, recording = on_ranks(2, lambda rank: train(loop, rank.number, rank.device, rank.recorded))
    assert not recording.races()
    found = {}
    for place, nodes in recording.waits().items():
        if "at zeroopt/" in place and not place.startswith(_OF_THE_HOST):
            races = sum(recording.races(nodes).values())
            wrong = recording.wrong_orders(range(num_orders), nodes) if races else {}
            found[place] = races, len(wrong)
    return found


def test_each_wait_is_needed(on_pretend_cuda: PretendProcess) -> None:
    found: dict[str, list[tuple[int, int]]] = {}
    for loop in LOOPS.values():
        for place, result in on_pretend_cuda(_leave_out_each_wait, loop, NUM_ORDERS).items():
            found.setdefault(place, []).append(result)
    assert len(found) >= 10
    without_race = [place for place, results in found.items() if not any(races for races, _ in results)]
    assert without_race == []
    with_equal_bits = [place for place, results in found.items() if not any(wrong for _, wrong in results)]
    assert with_equal_bits == []
