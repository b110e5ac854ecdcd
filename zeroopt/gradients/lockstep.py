"""Whether all ranks are at the same place of the training loop: what each says of itself at the end of a backward.

Ranks compare two counts along with what they agree on after each backward anyway: the steps that a rank has taken, and the
backward passes that it has run since. Where collectives carry no names, that is how a backward or a step more or less than
the others' is noticed before gradients of different steps are used as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..collectives.failure import name_ranks

_LARGEST = 255  # counts travel as bytes, modulo 256
_MAX_LANES = 128  # so that what travels stays small; of more ranks than that, several share a lane


class Lockstep:
    """This rank's counts, and their comparison with those of the other ranks.

    What all ranks say travels in one array of bytes, of which they take the maximum. A rank writes into its lane, and zeros
    elsewhere:

        lane             0                 1
        bytes   s  ~s  b  ~b  |   s  ~s  b  ~b  |  …       s steps, b backward passes since; ~c = 255 - c

    The maximum of ~c gives the least c of the ranks that share a lane.

    Attributes:
        num_bytes: what travels.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._num_lanes = min(world_size, _MAX_LANES)
        self._world_size = world_size
        self._lane = rank % self._num_lanes
        self._num_steps = 0
        self._num_backwards = 0
        self.num_bytes = 4 * self._num_lanes

    def note_backward(self, num_steps: int) -> bytes:
        """What this rank says at the end of a backward that `num_steps` steps came before."""
        if num_steps != self._num_steps:
            self._num_steps, self._num_backwards = num_steps, 0
        self._num_backwards += 1
        said = bytearray(self.num_bytes)
        steps, backwards = self._num_steps & _LARGEST, self._num_backwards & _LARGEST
        said[4 * self._lane : 4 * self._lane + 4] = (steps, _LARGEST - steps, backwards, _LARGEST - backwards)
        return bytes(said)

    def difference(self, agreed: Sequence[int]) -> str | None:
        """What ranks have said that is not the same on all of them, as a sentence; None where all is well.

        Args:
            agreed: the maximum over ranks of what `note_backward` gave for one backward.
        """
        ranks_at: dict[tuple[int, ...], list[int]] = {}
        for lane in range(self._num_lanes):
            said = tuple(agreed[4 * lane : 4 * lane + 4])
            if any(said):  # all ranks speak, but in torch's fake process group there is only this one
                ranks_at.setdefault(said, []).extend(range(lane, self._world_size, self._num_lanes))
        if len(ranks_at) == 1 and all(sum(said[i : i + 2]) == _LARGEST for said in ranks_at for i in (0, 2)):
            return None
        places = [f"{name_ranks(sorted(ranks))} had taken {self._describe(*said)}" for said, ranks in ranks_at.items()]
        return f"at the end of a backward, {'; '.join(places)}"

    def _describe(self, steps: int, not_steps: int, backwards: int, not_backwards: int) -> str:
        counted_steps = _describe_count(steps, not_steps, self._num_steps, "step")
        return f"{counted_steps} and run {_describe_count(backwards, not_backwards, self._num_backwards, 'backward')} since"


def _describe_count(most: int, not_least: int, own: int, noun: str) -> str:
    """The counts of a lane in words: of all numbers that they may stand for, those that are next to this rank's."""
    most, least = (own + (count - own + 128) % 256 - 128 for count in (most, _LARGEST - not_least))
    counts = str(most) if least == most else f"{least} to {most}"
    return f"{counts} {noun}{'' if least == most == 1 else 's'}"
