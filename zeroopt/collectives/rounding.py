"""Which random numbers round what travels as codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_COUNTS = 2**32
_MOST_STRIPES = 2**12  # of a bucket; those of larger ones round by numbers of other buckets, too


class RoundingNumbers:
    """What random numbers go by on all ranks of a run, from its first beginning on, however often it was resumed.

    Attributes:
        seed: the same on all ranks.

    Args:
        count: tells how many backward passes and steps there have been in this process.
    """

    def __init__(self, seed: int, count: Callable[[], tuple[int, int]]) -> None:
        self.seed = seed
        self._count = count
        self._before = (0, 0)

    @property
    def backward(self) -> int:
        """The number of the backward that runs, or was the last."""
        return (self._before[0] + self._count()[0]) % _COUNTS

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return (self._before[1] + self._count()[1]) % _COUNTS

    def save(self) -> dict[str, int]:
        """For another process to go on from."""
        return {"seed": self.seed, "backward": self.backward, "step": self.step}

    def load(self, saved: Mapping[str, int]) -> None:
        """Go on from what was saved."""
        backwards, steps = self._count()
        self.seed = saved["seed"]
        self._before = (saved["backward"] - backwards, saved["step"] - steps)


@dataclass(frozen=True)
class Noise:
    """By which one rank rounds its gradients in one bucket.

    Attributes:
        rank: in the process group.
        key: of the bucket; see `Bucket.key`.
    """

    numbers: RoundingNumbers
    rank: int
    key: int

    @property
    def seed(self) -> int:
        """An odd factor: other ranks, and other jobs with seeds side by side, round by other numbers."""
        return (self.numbers.seed + (self.rank + 1) * 0x9E3779B97F4A7C15) % 2**64

    def key_of(self, stripe: int) -> int:
        """Of the stripe of that number."""
        return (self.key * _MOST_STRIPES + stripe) % _COUNTS
