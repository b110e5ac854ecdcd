"""Steps of two buckets, whose times can be told by hand.

Forward takes 1 s a bucket, backward 2 s; a reduce-scatter is 3 s on the network, an all-gather 1 s, unless a test says otherwise.
"""

from __future__ import annotations

import pytest

from zeroopt.simulator.collectives import CALLER, NETWORK, Halves, Phase, Ranks
from zeroopt.simulator.machine import Machine
from zeroopt.simulator.peers import DdpTraining, Fsdp2Training
from zeroopt.simulator.training import Rules, ZeroTraining
from zeroopt.simulator.workload import Load, Workload

MACHINE = Machine(host_ranks=1, flops=1.0, memory_bandwidth=1.0)
LOAD = Load(forward=1.0, backward=2.0, gradients=1.0, parameters=1.0, packed=0.0, stepped=0.0)
TWO = Workload((LOAD, LOAD), "pairwise")
RANKS = Ranks(MACHINE, 2)
UNBOUNDED = Rules(shards=True, buffers=None, most=None)


def cost(ranks: Ranks, num_bytes: float) -> Halves:
    return Halves((Phase(NETWORK, 3.0),), (Phase(NETWORK, 1.0),))


def with_sums(ranks: Ranks, num_bytes: float) -> Halves:
    return Halves((Phase(CALLER, 1.0), Phase(NETWORK, 3.0), Phase(CALLER, 1.0)))


def laps(rules: Rules, cost_of: object = cost) -> list[float]:
    training = ZeroTraining(TWO, RANKS, rules, cost_of)  # type: ignore[arg-type]
    training.run(3)
    return [lap.seconds for lap in training.laps]


def test_buckets_travel_beside_backward_and_gathers_beside_the_next_forward() -> None:
    """forward to 2, buckets full at 4 and 6, on the link 4-7 and 7-10, gathers 10-11 and 11-12: the second forward begins with the bucket that
    comes last, at 12, ends at 14, and its last bucket has travelled at 22."""
    assert laps(UNBOUNDED) == [10, 12, 12]


@pytest.mark.parametrize(
    "rules",
    [Rules(shards=True, buffers=None, most=0), Rules(shards=True, buffers=1, most=None)],
    ids=["most", "buffers"],
)
def test_without_overlap_each_bucket_is_waited_for(rules: Rules) -> None:
    """Full at 4, there at 7, full at 9, there at 12; gathers until 14."""
    assert laps(rules) == [12, 14, 14]


def test_stage_0_gathers_sums_before_the_step() -> None:
    """Reduces 4-7 and 7-10; the first gather is asked for at 7, and goes 10-11, the second 11-12. Nothing is left for the next forward."""
    assert laps(Rules(shards=False, buffers=None, most=None)) == [12, 12, 12]


def test_the_ranks_own_thread_does_its_part_only_when_it_comes_by() -> None:
    """Full at 4, summed here until 5, on the link 5-8, though backward goes on 5-7; the second is summed here 7-8, on the link 8-11. The first
    is finished 8-9, the second 11-12."""
    training = ZeroTraining(TWO, RANKS, UNBOUNDED, with_sums)
    lap = training.run(2)
    assert lap.seconds == 12
    assert lap.parts == {"forward": 2, "backward": 4, "step": 0, "communication": 4, "waiting": 2}
    assert lap.busy[NETWORK] == 6


def test_ddp_all_reduces_beside_backward() -> None:
    """Each bucket's two halves: 4-7, 7-10, 10-11, 11-12."""
    training = DdpTraining(TWO, RANKS, cost)
    assert training.run(2).seconds == 12


def test_fsdp2_gathers_twice() -> None:
    """Forward: gathers 0-1, 1-2, computes 1-2, 2-3. Backward: gathers 3-4 and 4-5, computes 4-6 and 6-8, reduces 6-9 and 9-12."""
    assert Fsdp2Training(TWO, RANKS, cost).run(2).seconds == 12


def test_ranks_share_cores_and_wait_for_the_slowest() -> None:
    crowded = Machine(host_ranks=4, flops=1.0, memory_bandwidth=1.0, cores=2)
    alone = Workload((LOAD,), "single")
    assert ZeroTraining(alone, Ranks(crowded, 4), UNBOUNDED).run(1).seconds == 6
    noisy = Machine(host_ranks=1, flops=1.0, memory_bandwidth=1.0, noise=0.03)
    assert ZeroTraining(alone, Ranks(noisy, 10_000), UNBOUNDED).run(1).seconds == pytest.approx(3 * 1.12, rel=0.01)


def test_libraries_threads_take_time_from_what_is_computed() -> None:
    def busy(ranks: Ranks, num_bytes: float) -> Halves:
        return Halves((Phase(NETWORK, 0.0, processor_s=0.5),))

    assert ZeroTraining(TWO, RANKS, UNBOUNDED, busy).run(3).seconds == 7
