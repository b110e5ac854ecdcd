"""Memory for what is received: one piece, as large as the largest that was asked for, where collectives come one after the other."""

from __future__ import annotations

import torch

from zeroopt.collectives.comm_stream import CommStream
from zeroopt.collectives.scratch import Scratch


def _scratch(*, blocks_host: bool) -> Scratch:
    return Scratch(CommStream(torch.device("cpu"), blocks_host=blocks_host))


def test_one_piece_for_all_that_come_one_after_the_other() -> None:
    scratch = _scratch(blocks_host=False)
    first = scratch.take(8, torch.zeros(1))
    second = scratch.take(5, torch.zeros(1, dtype=torch.bfloat16))
    assert (first.shape, first.dtype) == ((8,), torch.float32)
    assert (second.shape, second.dtype) == ((5,), torch.bfloat16)
    assert second.data_ptr() == first.data_ptr()


def test_after_a_drop_there_is_one_for_the_largest_at_once() -> None:
    scratch = _scratch(blocks_host=False)
    scratch.take(4, torch.zeros(1))
    scratch.take(100, torch.zeros(1))
    scratch.drop()
    small = scratch.take(4, torch.zeros(1))
    assert small.untyped_storage().nbytes() == 400
    assert scratch.take(100, torch.zeros(1)).data_ptr() == small.data_ptr()


def test_each_has_its_own_where_the_host_waits() -> None:
    scratch = _scratch(blocks_host=True)
    first, second = scratch.take(8, torch.zeros(1)), scratch.take(8, torch.zeros(1))
    assert first.data_ptr() != second.data_ptr()
