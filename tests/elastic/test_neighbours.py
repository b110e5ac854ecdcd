"""Copies on another host, and what is fetched from there. Each rank is a host, whose memory is a directory of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from checkpoints import all_of, assert_all_same, train, wrapped
from hypothesis import given
from hypothesis import strategies as st
from worker_pool import RunOnRanks

from zeroopt.elastic import Guard, guard
from zeroopt.elastic.neighbours import Ring
from zeroopt.elastic.slots import Slots


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_each_rank_is_kept_on_the_next_host(sizes: list[int]) -> None:
    ranks = iter(range(sum(sizes)))
    hosts = [[next(ranks) for _ in range(size)] for size in sizes]
    host_of = {rank: number for number, host in enumerate(hosts) for rank in host}
    rings = {rank: Ring.of(rank, hosts) for rank in host_of}
    for rank, ring in rings.items():
        assert ring.to is not None
        assert host_of[ring.to] == (host_of[rank] + 1) % len(hosts)
        assert rank in rings[ring.to].sources
    assert sum(len(ring.sources) for ring in rings.values()) == len(rings)


def test_a_host_alone_has_nobody() -> None:
    assert Ring.of(1, [[0, 1]]) == Ring(None, [])


def hosts_of(control: Any) -> list[list[int]]:
    return [[rank] for rank in range(control.size)]


def guarded(root: Path, steps: int, every: int = 1) -> Any:
    """Train on from what there is, each rank on a host of its own; what there was at the beginning, and is at the end."""
    memory = root / f"host-{dist.get_rank()}"
    if not memory.exists():
        memory.mkdir(parents=True)
        (memory / "agent").write_text(str(dist.get_rank()))
    model, optimizer = wrapped("mlp", "adamw", {})
    with patch.object(guard, "ranks_by_host", hosts_of):
        # Each host by a name of its own, as that of torchrun's agent is.
        job = f"agent-{(memory / 'agent').read_text()}"
        guards = Guard(model, optimizer, every=every, job=job, memory=memory)
    first = guards.restore().get("step", 0)
    values = [all_of(model, [optimizer])]
    for step in range(first, steps):
        train(model, optimizer, "mlp", range(step, step + 1))
        guards.step(step + 1)
    guards.wait()
    guards._sending.wait()
    return first, *values, all_of(model, [optimizer])


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_host_takes_nothing_with_it(run_on_ranks: RunOnRanks, tmp_path: Path, lost: int) -> None:
    (_, _, expected), *_ = run_on_ranks(3, guarded, tmp_path, 3)
    shutil.rmtree(tmp_path / f"host-{lost}")
    replaced = run_on_ranks(3, guarded, tmp_path, 5)
    assert [first for first, *_ in replaced] == [3] * 3
    assert_all_same([values for _, values, _ in replaced], expected)
    shutil.rmtree(tmp_path / f"host-{lost}")
    for number, kept in enumerate(one for one in range(3) if one != lost):
        (tmp_path / f"host-{kept}").rename(tmp_path / f"left-{number}")
    for number in range(2):
        (tmp_path / f"left-{number}").rename(tmp_path / f"host-{number}")
    fewer = run_on_ranks(2, guarded, tmp_path, 5)
    assert [first for first, *_ in fewer] == [5] * 2
    assert_all_same([values for _, values, _ in fewer], replaced[0][2])


def test_with_copies_every_few_steps_it_goes_on_from_the_last_of_them(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    (_, _, expected), *_ = run_on_ranks(2, guarded, tmp_path / "short", 3)
    run_on_ranks(2, guarded, tmp_path / "long", 5, 3)
    shutil.rmtree(tmp_path / "long" / "host-1")
    after = run_on_ranks(2, guarded, tmp_path / "long", 3, 3)
    assert [first for first, *_ in after] == [3, 3]
    fetched = [path for path in (tmp_path / "long" / "host-1").rglob("*-rank-*")]
    assert len(fetched) == 2
    assert all(path.stat().st_size == Slots.open(path).bytes_with_one for path in fetched), "one slot each"
    assert_all_same([values for _, values, _ in after], expected)
