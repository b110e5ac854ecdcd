"""Pieces of buckets from rank to rank: by messages and by a backend's all-to-all, in whatever order ranks own slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from worker_pool import RunOnRanks

from zeroopt.collectives import Transport
from zeroopt.collectives.exchange import Chained, cut_pieces
from zeroopt.collectives.pending import PendingCollective
from zeroopt.collectives.select import connect_transport

CPU = torch.device("cpu")
WORLD_SIZE = 3
# numel[source][target], by slice; most have nothing for most.
TRAFFIC = [[[2, 0, 3], [0, 4, 0], [1, 5, 0]], [[0, 0, 0], [7, 0, 0], [0, 0, 0]]]


def connected(name: str, turned: bool) -> Transport:
    group = dist.group.WORLD
    assert group is not None
    transport = connect_transport(name, group, CPU)
    if turned:  # rank 0 owns the last slice
        transport.slice_index = WORLD_SIZE - 1 - transport.slice_index
    transport.open_exchange()
    exchange = transport.exchange
    transport.open_exchange()
    assert transport.exchange is exchange
    return transport


def traffic_of(table: list[list[int]], own: int) -> tuple[dict[int, int], dict[int, int]]:
    sends = {to: numel for to, numel in enumerate(table[own]) if numel}
    return sends, {source: row[own] for source, row in enumerate(table) if row[own]}


def marked(source: int, to: int, numel: int) -> Tensor:
    return torch.arange(numel, dtype=torch.bfloat16) + 100 * source + 10 * to


def exchange_all(name: str, turned: bool) -> list[bool]:
    """Several at once, finished in another order on one rank."""
    transport = connected(name, turned)
    own = transport.slice_index
    started: list[tuple[PendingCollective, Tensor, Tensor]] = []
    for table in TRAFFIC:
        sends, receives = traffic_of(table, own)
        source = torch.cat([torch.empty(0, dtype=torch.bfloat16), *(marked(own, to, n) for to, n in sends.items())])
        target = torch.full((sum(receives.values()),), -1.0, dtype=torch.bfloat16)
        want = torch.cat([target[:0], *(marked(index, own, n) for index, n in receives.items())])
        started.append((transport.exchange.start(source, target, sends, receives), target, want))
    for pending, _, _ in started if own else reversed(started):
        pending.finish()
    return [torch.equal(target, want) for _, target, want in started]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["pairwise", "torch"])
def test_every_piece_gets_to_its_place(run_on_ranks: RunOnRanks, name: str, turned: bool) -> None:
    assert run_on_ranks(WORLD_SIZE, exchange_all, name, turned) == [[True, True]] * WORLD_SIZE


def exchange_in_place() -> tuple[list[float], int]:
    """What a rank has for itself lies where it is to be."""
    transport = connected("shm", turned=False)
    own = transport.slice_index
    full = torch.full((9,), float(own))
    # Rank 1 owns elements 2 to 7 of slices of three.
    sends, receives = [({}, {1: 3}), ({0: 1, 1: 3, 2: 2}, {1: 3}), ({}, {1: 2})][own]
    source, target = full[2:8] if own == 1 else full[:0], full[3 * own : 3 * own + sum(receives.values())]
    if own == 0:
        receives, target = {1: 1}, full[2:3]
    transport.exchange.start(source, target, sends, receives, label="a bucket").finish()
    return full.tolist(), transport.exchanged_bytes


def test_in_place(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(WORLD_SIZE, exchange_in_place) == [
        ([0, 0, 1, 0, 0, 0, 0, 0, 0], 0),
        ([1] * 9, 3 * 4),
        ([2, 2, 2, 2, 2, 2, 1, 1, 2], 0),
    ]


def replicas_meet() -> list[int]:
    transport = connected("pairwise", turned=False)
    rank = transport.control.rank
    transport.num_slices, transport.slice_index = 2, rank % 2  # two groups that own the same
    return transport.ranks_by_slice()


def test_ranks_that_own_the_same_slice_have_partners_of_their_own(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(4, replicas_meet) == [[0, 1], [0, 1], [2, 3], [2, 3]]


class _Noted(PendingCollective):
    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def finish(self) -> None:
        self._log.append(self._name)

    def is_past(self) -> bool:
        return True

    def wait_until_read(self) -> None:
        self._log.append(f"{self._name} is read")


@pytest.mark.parametrize("is_queued", [False, True])
def test_the_second_comes_behind_the_first(is_queued: bool) -> None:
    log: list[str] = []

    def start_second() -> PendingCollective:
        log.append("start second")
        return _Noted("second", log)

    chained = Chained(_Noted("first", log), start_second, is_queued=is_queued)
    assert log == (["start second"] if is_queued else [])
    assert chained.is_past() == is_queued
    chained.go_on()
    chained.go_on()
    chained.finish()
    chained.wait_until_read()
    assert log == [*([] if is_queued else ["first"]), "start second", "second", "first is read"]
    assert chained.is_past()


def test_pieces() -> None:
    flat = torch.arange(5)
    pieces: dict[int, Any] = cut_pieces(flat, {1: 2, 7: 3})
    assert {index: piece.tolist() for index, piece in pieces.items()} == {1: [0, 1], 7: [2, 3, 4]}
    assert cut_pieces(flat[:0], {}) == {}
