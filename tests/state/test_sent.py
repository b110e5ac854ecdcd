"""Small tensors of state travel by way of the CPU, and arrive where they belong. Fake tensors stand for those on a GPU."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zeroopt.state.sent import Sent

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_what_is_sent_is_a_copy_without_the_memory_around_it() -> None:
    steps = torch.arange(50_000.0)
    sent = Sent.of(steps[3])
    steps.zero_()
    assert sent.at(CPU).item() == 3 and len(pickle.dumps(sent)) < 5_000


@pytest.mark.parametrize("home", [CPU, CUDA], ids=str)
def test_it_arrives_beside_the_state_where_it_was(home: torch.device) -> None:
    with FakeTensorMode():
        sent = Sent.of(torch.ones((), device=CUDA))
        assert sent.values.device == CPU
        assert sent.at(home).device == home


def test_what_was_on_the_cpu_stays_there() -> None:
    with FakeTensorMode():
        assert Sent.of(torch.ones(())).at(CUDA).device == CPU
