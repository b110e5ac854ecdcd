"""Whether the pretend device finds what it is for: faults that are put there on purpose."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from . import known_faults
from .process import PretendProcess

pytestmark = pytest.mark.slow

RACES = [
    known_faults.packed_on_several_streams,
    known_faults.wrong_stream_waited_for,
    known_faults.buffer_filled_while_it_travels,
    known_faults.memory_of_a_buffer_that_travels,
    known_faults.parameters_read_while_they_are_gathered,
    known_faults.flags_rewritten_while_they_are_copied,
    known_faults.staged_but_not_there,
    known_faults.read_before_its_message_has_come,
]
NUM_ORDERS = 50


def _record(fault: Any, is_mended: bool) -> dict[str, Any]:
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> Tensor:
        with rank.recorded():
            result: Tensor = fault(rank.number, is_mended)
        return result.cpu()

    values, recording = on_ranks(2, run)
    return {
        "values": values,
        "races": [str(race) for race in recording.races()],
        "wrong orders": recording.wrong_orders(range(NUM_ORDERS)),
    }


@pytest.mark.parametrize("fault", RACES)
def test_a_fault_is_a_race_and_gives_other_bits(fault: Any, on_pretend_cuda: PretendProcess) -> None:
    mended = on_pretend_cuda(_record, fault, True)
    assert mended["races"] == []
    assert mended["wrong orders"] == {}
    found = on_pretend_cuda(_record, fault, False)
    assert found["races"]
    assert found["wrong orders"]


def test_a_host_that_reads_too_early_sees_what_was_there_before(on_pretend_cuda: PretendProcess) -> None:
    fault = known_faults.read_by_the_host_too_early
    for rank, value in enumerate(on_pretend_cuda(_record, fault, True)["values"]):
        assert value.eq(known_faults.NUMEL * (1.0 + rank)).all()
    for value in on_pretend_cuda(_record, fault, False)["values"]:
        assert value.eq(0.0).all()


def test_gradients_in_a_buffer_that_was_lent_are_wrong_in_every_order(on_pretend_cuda: PretendProcess) -> None:
    """No wait is missing, so it takes the numbers to find it."""
    fault = known_faults.gradients_added_to_what_was_gathered
    for is_mended in (True, False):
        found = on_pretend_cuda(_record, fault, is_mended)
        assert (found["races"], found["wrong orders"]) == ([], {})
        for value in found["values"]:
            assert bool(value.eq(1.0 + 2.0).all()) is is_mended


def test_two_ranks_that_both_send_first_are_an_error(on_pretend_cuda: PretendProcess) -> None:
    mended = on_pretend_cuda(_record, known_faults.both_send_first, True)
    assert (mended["races"], mended["wrong orders"]) == ([], {})
    assert [value[0].item() for value in mended["values"]] == [4.0, 2.0]
    with pytest.raises(AssertionError, match="have started different collectives as one"):
        on_pretend_cuda(_record, known_faults.both_send_first, False)


def test_collectives_in_another_order_are_an_error(on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_record, known_faults.started_in_another_order, True)["races"] == []
    with pytest.raises(AssertionError, match="ranks have started different collectives as one"):
        on_pretend_cuda(_record, known_faults.started_in_another_order, False)


def _wait_for_a_second(fault: Any, is_mended: bool) -> dict[str, Any]:
    from . import nccl

    before, nccl.TIMEOUT_S = nccl.TIMEOUT_S, 1.0
    try:
        return _record(fault, is_mended)
    finally:
        nccl.TIMEOUT_S = before


def test_a_collective_that_one_rank_does_not_start_is_an_error(on_pretend_cuda: PretendProcess) -> None:
    fault = known_faults.not_started_on_one_rank
    assert on_pretend_cuda(_wait_for_a_second, fault, True)["races"] == []
    with pytest.raises(AssertionError, match=r"watchdog: ranks \[1\] have not started all_reduce"):
        on_pretend_cuda(_wait_for_a_second, fault, False)
