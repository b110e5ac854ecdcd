"""What collectives take, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroopt.collectives import TRANSPORTS
from zeroopt.simulator.collectives import CALLER, COSTS, LOCAL, NETWORK, Halves, Ranks
from zeroopt.simulator.machine import H100, Machine

BUCKET = 25 * 2**20
CPU = Machine(
    host_ranks=2,
    flops=1e11,
    memory_bandwidth=8e9,
    cores=2,
    local_bandwidth=2e9,
    local_latency=1e-5,
    network_bandwidth=1.25e8,
    network_latency=1e-4,
    message_s=5e-5,
    byte_s=1e-9,
)


def seconds(halves: Halves, where: str | None = None) -> float:
    phases = (*halves.reduce_scatter, *halves.all_gather)
    return sum(phase.seconds + (0 if where else phase.latency) for phase in phases if where in (None, phase.where))


def test_every_transport_has_its_cost() -> None:
    assert set(TRANSPORTS) - {"auto"} <= COSTS.keys()
    assert {"hybrid", "single"} <= COSTS.keys()


@pytest.mark.parametrize("name", COSTS)
def test_a_rank_alone_pays_nothing(name: str) -> None:
    assert seconds(COSTS[name](Ranks(CPU.with_host_ranks(1), 1), BUCKET)) == 0


@pytest.mark.parametrize("name", sorted(COSTS.keys() - {"single", "shm", "pairwise", "tree", "all_to_all"}))
@given(hosts=st.integers(2, 40), host_ranks=st.integers(1, 8))
def test_only_what_has_to_leaves_a_host(name: str, hosts: int, host_ranks: int) -> None:
    """(H-1)/H of a bucket in each half; a ring over all ranks sends (N-1)/N over every link."""
    ranks = Ranks(CPU.with_host_ranks(host_ranks), hosts * host_ranks)
    parts = ranks.world_size if name in ("ring", "torch") else hosts
    moved = 2 * BUCKET * (parts - 1) / parts
    assert seconds(COSTS[name](ranks, BUCKET), NETWORK) * CPU.network_bandwidth == pytest.approx(moved)


def test_pairwise_sends_what_others_own_once_for_each_rank_of_a_host() -> None:
    assert seconds(COSTS["pairwise"](Ranks(CPU, 4), BUCKET), NETWORK) * CPU.network_bandwidth == 2 * BUCKET


def test_hybrid_by_hand() -> None:
    """Two hosts of two ranks: half a bucket is exchanged by a rank, of which a quarter of the bucket leaves by it."""
    halves = COSTS["hybrid"](Ranks(CPU, 4), 8e6)
    summed, travels, summed_again = halves.reduce_scatter
    assert (summed.where, summed.seconds) == (CALLER, pytest.approx(8e6 * 1.5 / 8e9))
    assert (travels.where, travels.seconds, travels.latency) == (NETWORK, pytest.approx(4e6 / 1.25e8), 1e-4)
    assert travels.processor_s == pytest.approx(2 * (2e6 * 1e-9 + 5e-5))
    assert (summed_again.where, summed_again.seconds) == (CALLER, pytest.approx(4e6 * 1.5 / 8e9))
    assert [phase.where for phase in halves.all_gather] == [NETWORK, LOCAL]


def test_small_buckets_go_in_rounds_and_large_ones_in_pairs() -> None:
    ranks = Ranks(CPU.with_host_ranks(1), 16)
    small, large = 16 * 2**14, 16 * 2**24
    rounds, pairs = (COSTS[name](ranks, small).all_gather[0] for name in ("tree", "pairwise"))
    assert rounds.seconds == pytest.approx(pairs.seconds) and rounds.latency == 4 * pairs.latency
    saved = 2 * (15 - 4) * CPU.message_s
    assert pairs.processor_s - rounds.processor_s == pytest.approx(saved)
    assert COSTS["tree"](ranks, large) == COSTS["pairwise"](ranks, large)


def test_a_flat_ring_of_a_thousand_ranks_waits_for_hops_and_three_levels_do_not() -> None:
    """As NCCL's own model has it: 2.2 ms of latency for 1,024 ranks, against half a millisecond for a bucket's bytes."""
    ranks = Ranks(H100, 1024)
    flat = COSTS["ring"](ranks, BUCKET).reduce_scatter[0]
    assert flat.latency == pytest.approx(2.2e-3, rel=0.02)
    assert flat.seconds == pytest.approx(0.52e-3, rel=0.02)
    levels = {name: seconds(COSTS[name](ranks, BUCKET)) for name in ("ring", "two levels", "three levels")}
    assert levels["ring"] > levels["two levels"] > levels["three levels"]
    assert seconds(COSTS["ring"](Ranks(H100, 8), BUCKET), LOCAL) * H100.local_bandwidth == pytest.approx(
        2 * BUCKET * 7 / 8
    )
