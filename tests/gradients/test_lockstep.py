"""Ranks that are not at the same place of the training loop all hear where the others are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from short_timeouts import lose_patience
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.gradients.lockstep import Lockstep

ODD_RANK = 1
ODD_STEP = 2
TIMEOUT_S = 3.0
NEVER_S = 600.0  # who raises under it has not waited for it

places = st.integers(0, 1000), st.integers(1, 300)


def said(rank: int, world_size: int, steps: int, backwards: int) -> tuple[Lockstep, bytes]:
    """A rank that has come to a place, and what it says there."""
    lockstep = Lockstep(rank, world_size)
    for _ in range(backwards):
        counts = lockstep.note_backward(steps)
    return lockstep, counts


def agreed(everyone: list[bytes]) -> list[int]:
    return [max(column) for column in zip(*everyone, strict=True)]


@given(st.tuples(*places), st.integers(1, 5))
def test_ranks_at_one_place_do_not_differ(place: tuple[int, int], world_size: int) -> None:
    ranks = [said(rank, world_size, *place) for rank in range(world_size)]
    counts = agreed([counts for _, counts in ranks])
    assert [lockstep.difference(counts) for lockstep, _ in ranks] == [None] * world_size


@given(st.tuples(*places), st.sampled_from([(1, 0), (0, 1), (-1, 2), (100, 0)]))
def test_places_are_named_whole_and_alike_on_all_ranks(place: tuple[int, int], ahead: tuple[int, int]) -> None:
    steps, backwards = place
    other = max(0, steps + ahead[0]), backwards + ahead[1]
    if other == place:
        return
    ranks = [said(rank, 3, *(other if rank == ODD_RANK else place)) for rank in range(3)]
    differences = [lockstep.difference(agreed([counts for _, counts in ranks])) for lockstep, _ in ranks]
    described = [
        f"{s} {'step' if s == 1 else 'steps'} and run {b} backward{'' if b == 1 else 's'} since"
        for s, b in (place, other)
    ]
    assert (
        differences
        == [f"at the end of a backward, ranks 0, 2 had taken {described[0]}; rank 1 had taken {described[1]}"] * 3
    )


def test_backwards_count_from_the_last_step() -> None:
    lockstep = Lockstep(1, 2)
    said = [lockstep.note_backward(steps) for steps in (0, 0, 1)]
    assert [list(counts[4:]) for counts in said] == [[0, 255, 1, 254], [0, 255, 2, 253], [1, 254, 1, 254]]
    assert all(not any(counts[:4]) for counts in said)


def test_what_travels_stays_small() -> None:
    """Ranks share lanes where there are many; a difference within one is noticed too."""
    world_size = 300
    assert Lockstep(0, world_size).num_bytes <= 512
    alike = [said(rank, world_size, 7, 1) for rank in range(world_size)]
    assert all(lockstep.difference(agreed([counts for _, counts in alike])) is None for lockstep, _ in alike[::50])
    ranks = [said(rank, world_size, 7 + (rank == 130), 1) for rank in range(world_size)]
    difference = ranks[0][0].difference(agreed([counts for _, counts in ranks]))
    assert difference is not None
    assert "ranks 2, 130, 258 had taken 7 to 8 steps and run 1 backward since" in difference
    assert "ranks 0, 1, 3, 4, 5, 6, 7, 8 and 289 others had taken 7 steps and run 1 backward since" in difference


def test_a_rank_alone_in_a_fake_group_differs_from_nobody() -> None:
    lockstep = Lockstep(9993, 10_000)
    assert lockstep.difference(list(lockstep.note_backward(3))) is None


class Net(nn.Module):
    """Three buckets, and buffers that ranks take over before a forward."""

    def __init__(self, *, buffers: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(50, 50) for _ in range(3)))
        self.norm = nn.BatchNorm1d(50, affine=False) if buffers else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers(x)).square().mean()


def diverge(
    how: str, transport: str, timeout_s: float, *, at: int = ODD_STEP, buffers: bool = False, stage: int = 2
) -> str:
    """Train. At some step, one rank does something else than the others. Returns what this rank hears of it."""
    torch.manual_seed(0)
    net = Net(buffers=buffers)
    group = dist.new_group()
    inner = torch.optim.AdamW(net.parameters())
    model, optimizer = zeroopt.wrap(net, inner, stage, group, bucket_mb=0.01, transport=transport)
    x = torch.randn(3, 50)
    try:
        for step in range(at + 2):
            odd = how if dist.get_rank() == ODD_RANK and step == at else ""
            if step == at:
                lose_patience(timeout_s)
            if odd == "extra forward":
                model(x)
            model(x).backward()
            if odd == "extra backward":
                model(x).backward()
            if odd == "clips":
                optimizer.clip_grad_norm_(1.0)
            if odd != "skipped step":
                optimizer.step()
            optimizer.zero_grad()
    except zeroopt.CollectiveError as error:
        return str(error)
    return "nothing"


def diverge_in_both_ways(transport: str, stage: int) -> list[str]:
    """So that nobody waits for a timeout."""
    return [diverge(how, transport, NEVER_S, stage=stage) for how in ("extra backward", "skipped step")]


BUCKET_0 = "bucket 0 (layers.2.bias … layers.2.weight)"


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("transport", "stage"), [("shm", 0), ("shm", 2), ("pairwise", 0), ("torch", 0)])
def test_all_ranks_hear_at_once_who_is_where(
    run_on_ranks: RunOnRanks, transport: str, stage: int, world_size: int
) -> None:
    ranks = run_on_ranks(world_size, diverge_in_both_ways, transport, stage)
    assert ranks == [ranks[0]] * world_size, "one text for all"
    others = "rank 0" if world_size == 2 else "ranks 0, 2"
    for heard in ranks[0]:
        assert heard.startswith(f"transport {transport}: the ranks have diverged: ")
        assert heard.endswith("let none skip a step or go on after an exception alone")
        if transport == "shm":
            assert (
                f"{others} at the rendezvous of step (0 bytes); rank 1 at the reduce-scatter of {BUCKET_0} (" in heard
            )
        else:
            assert f"{others} had taken 3 steps and run 1 backward since; rank 1 had taken 2 steps" in heard
            assert f"the gradients of {BUCKET_0} and all that follow belong to different steps" in heard


@pytest.mark.parametrize(
    ("how", "options", "expected"),
    [
        (
            "extra backward",
            {},
            ["transport pairwise, all-gather of bucket 2 (", f"transport pairwise, reduce-scatter of {BUCKET_0}"],
        ),
        (
            "extra backward",
            {"at": 0},
            ["planning the buckets anew", f"transport pairwise, reduce-scatter of {BUCKET_0}"],
        ),
        ("clips", {}, ["transport pairwise, all-gather of bucket 2 (", "transport pairwise, gather of gradient norms"]),
        (
            "extra forward",
            {"buffers": True},
            [f"transport pairwise, reduce-scatter of {BUCKET_0}", "forward, taking over the buffers of rank 0"],
        ),
    ],
    ids=str,
)
def test_timeouts_say_what_for_and_for_whom(
    run_on_ranks: RunOnRanks, how: str, options: dict[str, Any], expected: list[str]
) -> None:
    """Messages meet none of another kind, so ranks that have diverged wait for each other, until the first gives up."""
    ranks = run_on_ranks(2, diverge, how, "pairwise", TIMEOUT_S, **options)
    for rank, (heard, what) in enumerate(zip(ranks, expected, strict=True)):
        assert heard.startswith(what), heard
        assert f": failed for want of rank {1 - rank}: " in heard
    assert any(
        "the ranks have diverged. Every rank must run forward, backward and step equally often" in h for h in ranks
    )
