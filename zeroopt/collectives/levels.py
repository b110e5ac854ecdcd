"""Ranks in levels, a node and then nodes for one: who exchanges with whom on each, and which slice of a bucket that leaves to a rank.

levels (2, 3)                  ranks 0 1 | 2 3 | 4 5
level 0: ranks of a node       {0 1} {2 3} {4 5}       each keeps one of 2 blocks of the bucket
level 1: one rank of each      {0 2 4} {1 3 5}         each keeps one of 3 parts of that block

bucket          |   block 0              |   block 1              |
owned by        | rank 0 | rank 2 | rank 4 | rank 1 | rank 3 | rank 5 |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Levels:
    """Of the ranks of a process group.

    Args:
        sizes: how many exchange with each other on each level, the closest first. Their product is the number of ranks.
        ranks: in the order in which levels count them: those of the first node, then those of the second.
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        assert math.prod(self.sizes) == len(self.ranks)

    @classmethod
    def of_hosts(cls, hosts: Sequence[Sequence[int]]) -> Levels:
        """Two: the ranks of a host, as many on each, and hosts. One, where there is only one host, or one rank on each."""
        sizes = (len(hosts[0]), len(hosts))
        ranks = tuple(rank for host in hosts for rank in host)
        return cls(tuple(size for size in sizes if size > 1) or (1,), ranks)

    def members(self, rank: int, level: int) -> list[int]:
        """The ranks with which one exchanges on a level, itself among them, in the order of the parts that they keep."""
        place, step = self.ranks.index(rank), math.prod(self.sizes[:level])
        first = place - place // step % self.sizes[level] * step
        return [self.ranks[first + i * step] for i in range(self.sizes[level])]

    def part(self, rank: int, level: int) -> int:
        """Which part a rank keeps on a level."""
        return self.ranks.index(rank) // math.prod(self.sizes[:level]) % self.sizes[level]

    def slice_of(self, rank: int) -> int:
        """Which slice of a bucket a rank owns."""
        index = 0
        for level, size in enumerate(self.sizes):
            index = index * size + self.part(rank, level)
        return index
