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


def test_parameters_do_not_share_what_was_sent_once() -> None:
    sent = Sent.of(torch.ones(()))
    sent.at(CPU).add_(1)
    assert sent.at(CPU).item() == 1


def test_only_what_is_alike_to_the_bit_has_one_digest() -> None:
    alike = [torch.tensor(1.0), torch.tensor([2.0, 1.0])[1]]
    others = [torch.tensor([1.0]), torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.0), torch.tensor(-0.0)]
    assert len({Sent.of(tensor).digest() for tensor in alike}) == 1
    assert len({Sent.of(tensor).digest() for tensor in [*alike, *others]}) == 5


def test_what_was_on_the_cpu_stays_there() -> None:
    with FakeTensorMode():
        assert Sent.of(torch.ones(())).at(CUDA).device == CPU
