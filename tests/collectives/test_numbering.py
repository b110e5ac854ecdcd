"""Numbers of what is made over a group go with the group, not with its name."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from worker_pool import RunOnRanks

from zeroopt.collectives.numbering import next_number


def number_again(store: Path) -> tuple[list[int], list[int]]:
    """A group of ranks 0 and 1, then, in another world, one of the same name of all ranks."""
    pair = dist.new_group([0, 1])
    numbers = [next_number(pair, kind) for kind in ("a", "b", "a")] if dist.get_rank() < 2 else []
    name = pair.group_name if dist.get_rank() < 2 else None
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    everyone = dist.new_group(list(range(size)))
    assert name in (None, everyone.group_name)
    return numbers, [next_number(everyone, "a"), next_number(everyone, "a")]


def test_a_group_of_a_name_that_another_had_starts_anew(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    results = run_on_ranks(4, number_again, tmp_path / "store")
    assert [numbers for numbers, _ in results] == [[0, 0, 1], [0, 0, 1], [], []]
    assert [numbers for _, numbers in results] == [[0, 1]] * 4
