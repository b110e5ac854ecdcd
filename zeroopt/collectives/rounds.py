"""Who sends whom which slices, where a reduce-scatter takes a few rounds instead of a message between every two ranks.

`ops.reduce` sums in a fixed binary tree over ranks. The rounds climb that tree, lowest level first: two groups, whose ranks
together hold the sum of their group, become one.

    place           0   1   2   3   4   5   6          N = 7: after each level, the groups that hold a sum together
    level 0         └─┬─┘   └─┬─┘   └─┬─┘   │
    level 1           └───┬───┘       └──┬──┘
    level 2               └──────┬───────┘

In a group of four each rank holds a quarter of the bucket, in one of eight an eighth: in each round it keeps one half of what it
holds, sends the other to its partner in the other group, and adds what comes from there (recursive halving: Thakur, Rabenseifner and
Gropp, 2005). A left group is full, a right one may have fewer ranks: then each of these stands for several of the left group and
sends to them all. An all-gather goes down the same way, with what is sent and what is received exchanged (recursive doubling).

    messages a rank   log2(N), instead of N - 1; where N is no power of two, ranks of a right group of m ranks send up to 2^k / m
                      in one round
    bytes a rank      those of pairs, (N-1)/N of a bucket, for N a power of two

Slices lie in the order in which place 0 lets go of them, the reverse of their bits where N is a power of two, so that what
travels is mostly consecutive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix, in ascending order."""

    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def are_consecutive(self) -> bool:
        return self.numbers[-1] - self.numbers[0] + 1 == len(self.numbers)

    def of(self, matrix: Tensor) -> Tensor:
        """[number of rows, width]: a view where they are consecutive, else a copy."""
        if self.are_consecutive:
            return matrix.narrow(0, self.numbers[0], len(self.numbers))
        return matrix[list(self.numbers)]

    def within(self, other: Rows) -> Rows:
        """Where these rows are among others, which contain them."""
        place = {number: i for i, number in enumerate(other.numbers)}
        return Rows([place[number] for number in self.numbers])


@dataclass(frozen=True)
class Round:
    """What one rank does on one level of the tree, as the reduce-scatter goes.

    Attributes:
        level: 0 is that of single ranks.
        source: the place from which a sum of `keeps` comes.
        source_is_alone: it is a single rank: what it sends has been summed with nothing yet.
        holds: the slices of which this rank holds sums before.
        keeps: those of which it does so afterwards.
        sends: the others, by the place to which they go.
    """

    level: int
    source: int
    source_is_alone: bool
    holds: Rows
    keeps: Rows
    sends: dict[int, Rows]


@dataclass(frozen=True)
class Rounds:
    """All rounds of one rank.

    Attributes:
        slices: by place, which slice of the bucket it owns.
        climb: from single ranks to the root.
    """

    slices: Sequence[int]
    climb: Sequence[Round]

    @classmethod
    def of(cls, place: int, size: int) -> Rounds:
        """Those of a rank among others, by its place."""
        splits = _descend(0, size)
        order = splits[-1].holds[0] if splits else [0]  # of slices, by the place that owns each
        slices = [0] * size
        for index, owner in enumerate(order):
            slices[owner] = index
        climb = [
            Round(
                step.level,
                step.source,
                step.source_is_alone,
                _rows(step.holds[place], slices),
                _rows(step.keeps, slices),
                {to: _rows(sent, slices) for to, sent in step.sends.items()},
            )
            for step in _descend(place, size)
        ]
        return cls(slices, climb[::-1])


@dataclass(frozen=True)
class _Split:
    """Of a group into two, as one place of it sees it. Slices go by the place that owns them.

    Attributes:
        holds: by place, the slices whose sum over the part with this place it holds.
    """

    level: int
    source: int
    source_is_alone: bool
    holds: dict[int, list[int]]
    keeps: list[int]
    sends: dict[int, list[int]]


def _descend(place: int, size: int) -> list[_Split]:
    """The splits by which a group of all places comes down to one of them. At the root each place holds what it owns."""
    first, count = 0, size
    holds = {owner: [owner] for owner in range(size)}
    splits = []
    while count > 1:
        level = (count - 1).bit_length() - 1
        half = 1 << level
        left, right = range(first, first + half), range(first + half, first + count)
        stands_for = {other: right[(other - first) % len(right)] for other in left}  # who holds its slices on the right
        if place in left:
            part, source = left, stands_for[place]
            to_part = {other: left[other - right.start] for other in right}
        else:
            part, source = right, left[place - right.start]
            to_part = stands_for
        in_part = {owner: list(holds[owner]) for owner in part}
        for other, owner in to_part.items():
            in_part[owner] += holds[other]
        sends = {other: holds[other] for other, owner in to_part.items() if owner == place}
        is_alone = len(right if place in left else left) == 1
        splits.append(_Split(level, source, is_alone, in_part, holds[place], sends))
        holds, first, count = in_part, part.start, len(part)
    return splits


def _rows(owners: Sequence[int], slices: Sequence[int]) -> Rows:
    return Rows(sorted(slices[owner] for owner in owners))
