"""What an optimizer's own step makes lies in pages afterwards, with the same values in the same objects."""

from __future__ import annotations

import sys
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_slice import LoneStep, values
from torch import Tensor

from zeroopt.pages import trim_heap
from zeroopt.stepping.paged_state import new_state_in_pages
from zeroopt.stepping.plain import step_plain

LARGE = [values((200, 300), 0), values((300, 100), 1).t(), values((7,), 2), values((90_000,), 3)]


def in_pages(tensor: Tensor) -> bool:
    """What malloc gives does not begin with a page: its own header does."""
    return tensor.data_ptr() % PAGESIZE == 0 and tensor.numel() * 4 == tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adadelta])
def test_bits_are_those_of_torch_and_arrays_lie_in_pages(make: Any) -> None:
    options = {"lr": 0.1} | ({"momentum": 0.9} if make in (torch.optim.SGD, torch.optim.RMSprop) else {})
    step = LoneStep(LARGE, lambda groups: make(groups, **options), bucket_bytes=100_000)
    entries, tensors = {}, {}
    for number in range(3):
        active = step.backward(number, unused={0} if number == 0 else ())
        step_plain(step.optimizer, step.shards, active.tolist())
        step.twin.step()
        for segment in step.segments():
            managed, twin = segment.owner, step.twins[segment.owner.index]
            entry, expected = step.optimizer.state.get(segment.shard, {}), step.twin.state.get(twin, {})
            assert list(entry) == list(expected)
            assert entry is entries.setdefault((segment, bool(entry)), entry)
            for name, value in entry.items():
                assert value is tensors.setdefault((segment, name), value)
                flat = managed.flatten(expected[name]) if value.dim() else expected[name]
                assert torch.equal(value, flat)
                assert in_pages(value) or value.numel() <= 7
            assert torch.equal(managed.local, twin)
    assert len(tensors) >= len(LARGE)


class Aliasing(torch.optim.Optimizer):
    """Keeps arrays in containers, and others that share their memory."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})
        self.made_at = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                one = torch.zeros_like(param)
                self.made_at = one.data_ptr()
                state |= {
                    "history": [torch.zeros_like(param)],
                    "one": one,
                    "view": one.view(-1),
                    "param": param.detach(),
                }
            state["history"][0].add_(1)
            state["one"].add_(1)
            param.add_(1)


def test_what_shares_memory_goes_on_doing_so() -> None:
    leaf = torch.zeros(200, 300)
    optimizer = Aliasing([leaf])
    for number in (1, 2):
        with new_state_in_pages(optimizer, [leaf]):
            optimizer.step()
        state = optimizer.state[leaf]
        assert all(torch.all(state[name] == number) for name in ("one", "view", "param")) and torch.all(leaf == number)
        assert torch.all(state["history"][0] == number)
        assert in_pages(state["history"][0]) and state["one"].data_ptr() == optimizer.made_at


def test_state_that_was_there_stays_where_it_is() -> None:
    """Somebody may hold it, as torch's state dicts do."""
    leaf = torch.nn.Parameter(torch.zeros(200, 300))
    optimizer = torch.optim.SGD([leaf], momentum=0.9)
    optimizer.state[leaf] = {"momentum_buffer": torch.ones_like(leaf)}
    held = optimizer.state[leaf]["momentum_buffer"].detach()
    leaf.grad = torch.ones_like(leaf)
    with new_state_in_pages(optimizer, [leaf]):
        optimizer.step()
    buffer = optimizer.state[leaf]["momentum_buffer"]
    assert buffer.data_ptr() == held.data_ptr() and torch.all(held == torch.tensor(0.9) + 1)


def heap_bytes() -> int:
    """Resident in the C heap."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            found = words[-1] == "[heap]"
        elif found and words[0] == "Rss:":
            total += int(words[1]) << 10
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nothing_stays_in_the_heap() -> None:
    small = [values((150, 150), number) for number in range(40)]  # 90 kB each: from the heap
    step = LoneStep(small, lambda groups: torch.optim.AdamW(groups, lr=0.1))
    active = step.backward(0).tolist()
    trim_heap()
    before = heap_bytes()
    step_plain(step.optimizer, step.shards, active)
    made = sum(value.nbytes for entry in step.optimizer.state.values() for value in entry.values())
    assert made > 40 * 2 * 90_000 - 1 and heap_bytes() - before < made / 4
