"""Where in a slot what a rank copies lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.planner import SavePlan

from zeroopt.elastic.contents import Places, checksum_of, copy_into, kept_views, pack, put_back, shapes_of, take_out

RESIDUALS: dict[str, Any] = {
    "rounding": {"seed": 3},
    "left_out": {
        "a": {"start": 2, "values": torch.arange(5, dtype=torch.bfloat16)},
        "b": {"start": 0, "values": torch.arange(0)},
    },
    "model": {"a": {"start": 1, "values": torch.arange(40.0)}},
}


def test_what_a_rank_keeps_comes_back_from_its_slot() -> None:
    numbered, kept = take_out(RESIDUALS)
    places = Places.of(SavePlan([]), (), kept, len(pack(numbered)))
    slot = np.zeros(places.slot_bytes, dtype=np.uint8)
    for target, tensor in zip(kept_views(slot, places.kept_begin, shapes_of(kept)), kept, strict=True):
        copy_into(target, tensor)
    assert not slot[places.values_begin :].any()
    found = put_back(numbered, kept_views(slot, places.kept_begin, shapes_of(kept)))
    assert found["rounding"] == RESIDUALS["rounding"]
    for what in ("left_out", "model"):
        for name, piece in RESIDUALS[what].items():
            assert found[what][name]["start"] == piece["start"]
            assert torch.equal(found[what][name]["values"], piece["values"])


def test_a_checksum_is_of_the_elements_in_their_order() -> None:
    values = torch.arange(6.0).view(2, 3)
    assert checksum_of(values) == checksum_of(values.t().contiguous().t())
    assert checksum_of(values) != checksum_of(values.t())
    assert checksum_of(values) != checksum_of(values.flip(0))
    assert checksum_of(torch.empty(0)) == 0


def test_where_nothing_travels_as_codes_nothing_is_kept() -> None:
    assert take_out({}) == ({}, [])
    assert put_back({}, []) == {}
