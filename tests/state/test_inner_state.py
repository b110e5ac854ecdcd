"""The wrapped optimizer's state moves with the segments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zeroopt.plan.params import ManagedParam, ParamState
from zeroopt.state.inner_state import InnerState
from zeroopt.storage.segment import Segment


def segment() -> Segment:
    owner = ManagedParam("p", nn.Parameter(torch.zeros(3)), 0, 0, 0)
    return Segment(owner, 0, 0, 3, nn.Parameter(torch.zeros(3)), torch.float32)


def test_entries_are_taken_out_and_put_in() -> None:
    old, new, other = segment(), segment(), segment()
    entry: ParamState = {"step": torch.tensor(1.0), "note": "text"}
    state: dict[Tensor, ParamState] = {old.shard: entry, other.shard: {"step": 7}}
    inner = InnerState(state)
    assert inner.arrays(old) is entry, "live"
    assert inner.arrays(new) == {}
    assert new.shard not in state, "looking makes no entry"
    inner.forget(old)
    inner.forget(new)
    assert list(state) == [other.shard]
    inner.take(new, entry)
    assert state[new.shard] is entry and state[other.shard] == {"step": 7}
