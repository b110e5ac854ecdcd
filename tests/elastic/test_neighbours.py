"""Copies on another host, and what is fetched from there. Each rank is a host, whose memory is a directory of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from checkpoints import all_of, assert_all_same, same_batch, train, wrapped
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import CheckpointError
from zeroopt.collectives.pending import start_message
from zeroopt.elastic import Guard, guard, neighbours
from zeroopt.elastic.neighbours import Neighbours, Ring
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


def on_host(root: Path, model: Any, optimizer: Any, **options: Any) -> Guard:
    """A guard of a rank that is a host of its own, by a name of its own, as that of torchrun's agent is."""
    memory = root / f"host-{dist.get_rank()}"
    if not memory.exists():
        memory.mkdir(parents=True)
        (memory / "agent").write_text(str(dist.get_rank()))
    with patch.object(guard, "ranks_by_host", hosts_of):
        return Guard(model, optimizer, job=f"agent-{(memory / 'agent').read_text()}", memory=memory, **options)


def guarded(root: Path, steps: int, every: int = 1, newer_than: int = -1, **options: Any) -> Any:
    """Train on from what there is, each rank on a host of its own; what there was at the beginning, and is at the end."""
    model, optimizer = wrapped("mlp", "adamw", options)
    guards = on_host(root, model, optimizer, every=every)
    first = guards.restore(newer_than=newer_than).get("step", 0)
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


KINDS: list[dict[str, Any]] = [
    {"stage": 0, "bucket_mb": 0.002},
    {"param_dtype": torch.bfloat16},
    {"param_dtype": torch.bfloat16, "master_weights": "none"},
    {"parameter_compression": "int8"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_whatever_the_precision_it_takes_nothing_with_it(
    run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]
) -> None:
    (_, _, expected), *_ = run_on_ranks(2, guarded, tmp_path, 3, **options)
    shutil.rmtree(tmp_path / "host-1")
    replaced = run_on_ranks(2, guarded, tmp_path, 3, **options)
    assert [first for first, *_ in replaced] == [3] * 2
    assert_all_same([values for _, values, _ in replaced], expected)


def test_two_hosts_that_keep_each_others_copies_are_missed(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    (_, _, expected), *_ = run_on_ranks(3, guarded, tmp_path, 3)
    lost = [tmp_path / f"host-{number}" for number in (1, 2)]
    for host in lost:
        host.rename(tmp_path / f"away-{host.name}")
    for newer_than in (0, 2):
        shutil.copytree(tmp_path / "host-0", tmp_path / f"with-{newer_than}" / "host-0")
    errors: list[Any] = run_on_ranks.outcomes(3, guarded, tmp_path, 3)
    assert {error.type_name for error in errors} == {"CheckpointError"}
    assert all(
        "of step 3 there are copies of some ranks, but on no host of rank 1" in error.message for error in errors
    )
    for host in lost:  # only one of them was: nothing has been removed
        shutil.rmtree(host)
    (tmp_path / "away-host-1").rename(lost[0])
    after = run_on_ranks(3, guarded, tmp_path, 3)
    assert_all_same([values for _, values, _ in after], expected)
    for newer_than in (0, 2):  # who says what else there is goes on from that
        after = run_on_ranks(3, guarded, tmp_path / f"with-{newer_than}", 0, newer_than=newer_than)
        assert [first for first, *_ in after] == [0] * 3


def test_a_host_that_comes_back_with_copies_of_an_earlier_run_brings_none_of_them(
    run_on_ranks: RunOnRanks, tmp_path: Path
) -> None:
    run_on_ranks(2, guarded, tmp_path, 4)
    shutil.copytree(tmp_path / "host-1", tmp_path / "away")
    (_, _, expected), *_ = run_on_ranks(2, guarded, tmp_path, 3, newer_than=4, max_grad_norm=0.01)
    shutil.rmtree(tmp_path / "host-1")
    (tmp_path / "away").rename(tmp_path / "host-1")
    after = run_on_ranks(2, guarded, tmp_path, 3)
    assert [first for first, *_ in after] == [3, 3]
    assert_all_same([values for _, values, _ in after], expected)
    assert len(list(tmp_path.glob("host-1/zeroopt-*/*"))) == 2, "the earlier ones are gone"


def without_room_to_fetch(root: Path) -> Any:
    """The last rank has no room for what the other one has."""
    if dist.get_rank() == 0:
        return guarded(root, 3)
    with patch.object(Slots, "make", Mock(side_effect=OSError("no room"))):
        return guarded(root, 3)


def test_nobody_waits_for_a_host_that_has_no_room_for_what_it_lacks(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    (_, _, expected), *_ = run_on_ranks(2, guarded, tmp_path, 3)
    shutil.rmtree(tmp_path / "host-1")
    errors: list[Any] = run_on_ranks.outcomes(2, without_room_to_fetch, tmp_path)
    assert {error.type_name for error in errors} == {"CheckpointError"}
    assert all("bringing copies of step 3 to all hosts failed on rank 1: no room" in error.message for error in errors)
    assert list(tmp_path.glob("host-1/zeroopt-*/*")) == []
    after = run_on_ranks(2, guarded, tmp_path, 3)
    assert [first for first, *_ in after] == [3, 3]
    assert_all_same([values for _, values, _ in after], expected)


class Frozen(nn.Module):
    """Two matrices, one of which is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.top = nn.Linear(512, 512, bias=False).requires_grad_(False), nn.Linear(512, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.base(x))


def bytes_sent(root: Path, options: dict[str, Any]) -> int:
    """To the next host, for a copy."""
    net = Frozen()
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW([net.top.weight], lr=0.01), **options)
    guards = on_host(root, model, optimizer)
    sent = 0

    def counted(call: Any, tensor: Tensor, *args: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes if call.__name__ == "send" else 0
        return start_message(call, tensor, *args)

    for step in range(1, 3):
        model(torch.ones(2, 512)).sum().backward()
        optimizer.step()
        guards.step(step)
        guards.wait()
        guards._sending.wait()
        if step == 1:
            watching = patch.object(neighbours, "start_message", counted)
            watching.start()
    watching.stop()
    return sent


@pytest.mark.parametrize(
    ("options", "bytes_a_parameter"), [({}, 8), ({"param_dtype": torch.bfloat16, "cast_inputs": True}, 12)], ids=str
)
def test_what_all_ranks_have_is_not_sent(
    run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any], bytes_a_parameter: int
) -> None:
    room_for_values = 1 << 17
    for sent in run_on_ranks(2, bytes_sent, tmp_path, options):
        assert 0 <= sent - bytes_a_parameter * 512 * 512 // 2 < room_for_values


def without_room_at_first(root: Path, short: str) -> list[int]:
    """The last rank has no room for the first two copies. How many files its host and the other have after each step."""
    model, optimizer = wrapped("mlp", "adamw", {})
    guards = on_host(root, model, optimizer)
    files = []
    for step in range(1, 5):
        train(model, optimizer, "mlp", range(step, step + 1))
        if step <= 2:
            made = Slots.make if dist.get_rank() == 0 else Mock(side_effect=OSError("no room"))
            without = (
                patch.object(Slots, "make", made) if short == "own" else patch.object(guard, "Neighbours", no_room)
            )
            with without, pytest.raises(CheckpointError, match="no room"):
                guards.step(step)
        else:
            guards.step(step)
        files.append(len(list(root.glob(f"host-{dist.get_rank()}/zeroopt-*/*"))))
    guards.close()
    return files


def no_room(*args: Any) -> Neighbours:
    made = Neighbours(*args)
    if dist.get_rank() == 1:
        raise OSError("no room")
    return made


@pytest.mark.parametrize("short", ["own", "kept"])
def test_without_room_a_run_may_go_on_and_leaves_nothing(run_on_ranks: RunOnRanks, tmp_path: Path, short: str) -> None:
    assert run_on_ranks(2, without_room_at_first, tmp_path, short) == [[0, 0, 2, 2]] * 2


def copying_when_backward_ends(root: Path) -> list[bool]:
    """Whether what other ranks step is still being copied, when they may have stepped."""
    model, optimizer = wrapped("mlp", "adamw", {})
    guards = on_host(root, model, optimizer)
    busy = []
    for step in range(3):
        loss_of(model(same_batch("mlp", step))).backward()
        busy.append(guards._copying_alike.future is not None)
        optimizer.step()
        optimizer.zero_grad()
        guards.step(step + 1)
    guards.close()
    return busy


def test_no_rank_steps_before_what_it_changes_is_copied_by_all(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert run_on_ranks(2, copying_when_backward_ends, tmp_path) == [[False] * 3] * 2
