"""Batches of all ranks, and what is left of them when a run goes on."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from zeroopt.data import GlobalBatchSampler
from zeroopt.errors import ConfigError, StateError


def group(rank: int, size: int) -> dist.ProcessGroup:
    made = Mock()
    made.rank.return_value, made.size.return_value = rank, size
    return made


def samplers(ranks: int, *args: Any, **options: Any) -> list[GlobalBatchSampler]:
    return [GlobalBatchSampler(*args, process_group=group(rank, ranks), **options) for rank in range(ranks)]


def train(all_ranks: list[GlobalBatchSampler], steps: int, micro_batches: int = 1) -> list[list[int]]:
    """The global batches of so many steps, put together from those of the ranks."""
    batches: list[list[int]] = []
    while len(batches) < steps:
        drawn = [iter(one) for one in all_ranks]
        for _ in range(min(len(all_ranks[0]) // micro_batches, steps - len(batches))):
            batches.append([sample for mine in drawn for _ in range(micro_batches) for sample in next(mine)])
            for one in all_ranks:
                one.step()
    return batches


@given(
    st.integers(8, 60),
    st.sampled_from([8, 16]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(1, 9)), min_size=1, max_size=4),
)
def test_any_number_of_ranks_goes_on_with_the_same_batches(
    num_samples: int, batch_size: int, drop_last: bool, parts: list[tuple[int, int, int]]
) -> None:
    if batch_size > num_samples and drop_last:
        return
    options: dict[str, Any] = {"drop_last": drop_last, "seed": 3}
    expected = train(samplers(1, num_samples, batch_size, **options), sum(steps for *_, steps in parts))
    found, state = [], None
    for ranks, micro_batches, steps in parts:
        mine = samplers(ranks, num_samples, batch_size, micro_batches=micro_batches, **options)
        for one in mine if state is not None else ():
            one.load_state_dict(state)
        found += train(mine, steps, micro_batches)
        state = mine[0].state_dict()
        assert all(one.state_dict() == state for one in mine)
    assert found == expected


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_has_each_sample_once(drop_last: bool) -> None:
    sampler = GlobalBatchSampler(22, 8, drop_last=drop_last, process_group=group(0, 1))
    epochs = []
    for epoch in range(2):
        assert sampler.epoch == epoch and len(sampler) == (2 if drop_last else 3)
        drawn = []
        for batch in sampler:
            drawn += batch
            sampler.step()
        epochs.append(drawn)
        assert sampler.position == 22 * (epoch + 1)
    for drawn in epochs:
        assert len(set(drawn)) == (16 if drop_last else 22)
        assert drop_last or drawn[22:] == drawn[:2], "the first ones fill the last batch"
    assert epochs[0] != epochs[1]


def test_batches_that_were_drawn_and_not_trained_on_come_again() -> None:
    sampler = GlobalBatchSampler(64, 8, shuffle=False, process_group=group(0, 1))
    loader: DataLoader[Any] = DataLoader(range(64), batch_sampler=sampler, num_workers=1, prefetch_factor=4)  # type: ignore[arg-type]
    for number, _ in enumerate(loader):
        sampler.step()
        if number == 2:
            break
    other = GlobalBatchSampler(64, 8, shuffle=False, process_group=group(1, 2))
    other.load_state_dict(sampler.state_dict())
    assert next(iter(other)) == [28, 29, 30, 31]


def test_another_batch_size_goes_on_behind_the_samples_that_were_seen() -> None:
    first = GlobalBatchSampler(100, 10, shuffle=False, process_group=group(0, 1))
    for _ in range(3):
        first.step()
    second = GlobalBatchSampler(100, 32, shuffle=False, process_group=group(0, 1))
    second.load_state_dict(first.state_dict())
    assert [batch[0] for batch in second] == [30, 62]
    late = {**first.state_dict(), "position": 90}
    second.load_state_dict(late)
    assert second.epoch == 1, "what is left is no batch of this size"


def test_an_epoch_is_not_drawn_twice_for_want_of_a_step() -> None:
    sampler = GlobalBatchSampler(16, 8, process_group=group(0, 1))
    assert len(list(sampler)) == 2
    with pytest.raises(StateError, match=r"sampler\.step\(\) was not called"):
        list(sampler)
    sampler.step()
    assert len(list(sampler)) == 1


def test_a_position_in_another_order_is_refused() -> None:
    sampler = GlobalBatchSampler(16, 8, process_group=group(0, 1))
    state = sampler.state_dict()
    for name, value in (("num_samples", 17), ("seed", 1), ("shuffle", False)):
        with pytest.raises(StateError, match=f"saved with {name}={value}, and this sampler has"):
            sampler.load_state_dict({**state, name: value})


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="6 samples cannot be divided evenly by 2 ranks with 2 micro-batches each"):
        GlobalBatchSampler(16, 6, micro_batches=2, process_group=group(0, 2))
    with pytest.raises(ConfigError, match="a batch of 32 samples is more than the dataset's 16"):
        GlobalBatchSampler(16, 32, process_group=group(0, 2))
    with pytest.raises(ConfigError, match="have to be at least 1; got 16, 0 and 1"):
        GlobalBatchSampler(16, 0, process_group=group(0, 1))
