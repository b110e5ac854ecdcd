"""Whether all ranks are at the same place of the training loop: what each says of itself at the end of a backward.

Ranks compare two counts with what they agree on after each backward anyway: the steps that a rank has taken, and the
backward passes that it has run since. Where collectives carry no names, that is how a backward or a step more or less than
the others' is noticed before gradients of different steps are used as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from .collectives.failure import name_ranks

_MODULUS = 256  # counts travel as bytes


class Lockstep:
    """This rank's counts, and their comparison with those of the other ranks.

    All counts travel in one array of bytes, of which ranks take the maximum: each fills in its own places, and the others'
    are zero.

    Attributes:
        numel: bytes that the comparison takes.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._num_steps = 0
        self._num_backwards = 0
        self.numel = 2 * world_size

    def note_backward(self, num_steps: int) -> bytes:
        """What this rank says at the end of a backward that `num_steps` steps came before."""
        if num_steps != self._num_steps:
            self._num_steps, self._num_backwards = num_steps, 0
        self._num_backwards += 1
        counts = bytearray(self.numel)
        counts[self._rank] = self._num_steps % _MODULUS
        counts[self._world_size + self._rank] = self._num_backwards % _MODULUS
        return bytes(counts)

    def difference(self, counts: Sequence[int]) -> str | None:
        """What ranks have said that is not the same on all of them, as a sentence; None where all is well.

        Args:
            counts: the maximum over ranks of what `note_backward` gave for one backward.
        """
        places = list(zip(counts[: self._world_size], counts[self._world_size :], strict=True))
        if len(set(places)) == 1:
            return None
        ranks_at: dict[tuple[int, int], list[int]] = {}
        for rank, place in enumerate(places):
            ranks_at.setdefault(place, []).append(rank)
        said = [f"{name_ranks(ranks)} had taken {self._describe(*place)}" for place, ranks in ranks_at.items()]
        return f"at the end of a backward, {'; '.join(said)}"

    def _describe(self, steps: int, backwards: int) -> str:
        steps = _nearest(steps, self._num_steps)
        backwards = _nearest(backwards, self._num_backwards)
        return f"{steps} {'step' if steps == 1 else 'steps'} and run {backwards} backward{'' if backwards == 1 else 's'} since"


def _nearest(count: int, own: int) -> int:
    """Of the numbers that `count` may stand for the one that is next to this rank's."""
    half = _MODULUS // 2
    return own + (count - own + half) % _MODULUS - half
