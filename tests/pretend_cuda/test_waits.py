"""Every wait of a stream in zeroopt is there for a reason: leave one out, and there is a race, and an order that gives other bits."""

from __future__ import annotations

from collections.abc import Collection

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


def _leave_out_each_wait(loop: Loop, num_orders: int, known: Collection[str]) -> dict[str, tuple[bool, bool]]:
    """By the lines of each wait of zeroopt: whether there are races without it, and orders that give other bits.

    Args:
        known: lines that are left alone.
    """
    from .ranks import on_ranks
    from .surface import host_is_ahead

    with host_is_ahead():
        _, recording = on_ranks(2, lambda rank: train(loop, rank.number, rank.device, rank.recorded))
    assert not recording.races()
    found = {}
    for place, nodes in recording.waits().items():
        if "at zeroopt/" in place and not place.startswith(_OF_THE_HOST) and place not in known:
            races = bool(recording.races(nodes))
            found[place] = races, races and recording.has_wrong_order(range(num_orders), nodes)
    return found


def test_each_wait_is_needed(on_pretend_cuda: PretendProcess) -> None:
    seen: set[str] = set()
    raced: set[str] = set()
    wrong: set[str] = set()
    for loop in LOOPS.values():  # once there are other bits, there is nothing more to learn of a wait
        for place, (is_race, is_wrong) in on_pretend_cuda(_leave_out_each_wait, loop, NUM_ORDERS, wrong).items():
            seen.add(place)
            raced |= {place} if is_race else set()
            wrong |= {place} if is_wrong else set()
    assert len(seen) >= 10
    assert seen - raced == set()
    assert seen - wrong == set()
