"""Messages among many ranks: a few rounds in a tree, where pairs would send a message to every other rank.

A message costs a rank some 50 us of its processor whatever its size, so a small bucket of N ranks takes N - 1 times that on its way to
its sum, and as much again to be gathered. In rounds (`rounds`) it takes log2(N) messages, and as many bytes:

    reduce-scatter   recursive halving, the sums in the order of `ops.reduce`, kept in float32 (float64) from round to round: the bits are
                     those of pairs
    all-gather       recursive doubling
    largest flags    each rank tells what it knows to the rank 1, 2, 4, ... places on (dissemination: Hensgen, Finkel and Manber, 1988)
    numbers          the same, of more and more ranks (Bruck et al., 1997)

Rounds wait for one another, and pass over a bucket's elements more than once. So where a slice is large, for which one more message is
little, slices go straight to their owners as ever; and so do gradients in a form that is not summed by parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..profiling import named_range
from .driver import Driven, Driver
from .pairwise import GATHER, MAX, REDUCE, SCALAR, STAGING_BYTES, PairwiseTransport
from .pending import PendingCollective, PendingWork
from .rounds import Round, Rounds, Rows
from .site import Site
from .wire import PLAIN, Wire

# Both measured, see docs/hierarchy.md. From so many ranks on "auto" takes rounds where it would take pairs.
FROM_RANKS = 8
# Larger slices go straight to their owners.
SLICE_BYTES = 512 * 2**10


class TreeTransport(PairwiseTransport):
    """Small slices in rounds, large ones as pairs do.

    In which order collectives are finished makes no difference: a thread sees to the rounds (`driver`).
    """

    name = "tree"

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int] | None = None) -> None:
        super().__init__(group, members)
        rounds = Rounds.of(self.place, self.num_slices)
        self.order_slices(rounds.slices)
        self.climb = rounds.climb
        self.num_levels = (self.num_slices - 1).bit_length()
        self.driver = Driver()

    @classmethod
    def serves(cls, site: Site) -> bool:
        return super().serves(site) and site.group.size() >= FROM_RANKS

    @classmethod
    def hops_among(cls, num_slices: int, num_hosts: int) -> int:
        return (num_slices - 1).bit_length()

    @classmethod
    def staging_bytes(cls, num_bytes: int, item_bytes: int, num_slices: int, num_hosts: int) -> int:
        if not goes_in_rounds(num_bytes, num_slices):
            return super().staging_bytes(num_bytes, item_bytes, num_slices, num_hosts)
        climb = Rounds.of(0, num_slices).climb  # the first rank stands for others where groups are unlike
        return sum(_Memory(step, item_bytes, num_bytes // item_bytes // num_slices).num_bytes for step in climb)

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        if not wire.backend_sums or not goes_in_rounds(full.nbytes, self.num_slices):
            return super().start_reduce_scatter(full, out, base, wire=wire, label=label)
        climb = _Climb(self, full, out, base, label)
        return self.driver.start(Driven(climb.run))

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        if not goes_in_rounds(full.nbytes, self.num_slices):
            return super().start_all_gather(full, label=label)
        descent = _Descent(self, full, label)
        return self.driver.start(Driven(descent.run))

    def start_max(self, flags: Tensor, out: Tensor, *, label: str = "flags") -> PendingCollective:
        spread = _Spread(self, flags, MAX, f"transport {self.name}, max of {label}")

        def take_largest() -> None:
            known = flags
            for number, distance in enumerate(spread.distances):
                known = torch.maximum(known, spread.swap(number, distance, known))
            out.copy_(known)
            spread.finish_sends()

        return self.driver.start(Driven(take_largest))

    def gather_scalar(self, value: Tensor, *, label: str = "a number") -> Tensor:
        spread = _Spread(self, value, SCALAR, f"transport {self.name}, gather of {label}")
        known = value.reshape(1)  # of the ranks before this one, from it on
        for number, distance in enumerate(spread.distances):
            missing = self.num_slices - distance
            known = torch.cat([known, spread.swap(number, distance, known[:missing])])
        spread.finish_sends()
        return known[
            self.in_order_of_slices([(self.place - place) % self.num_slices for place in range(self.num_slices)])
        ]

    def give_up(self, reason: str) -> None:
        self.break_off([self.place ^ 1 if self.place ^ 1 < self.num_slices else 0])


def messages_among(num_ranks: int) -> type[PairwiseTransport]:
    """What moves messages among so many ranks."""
    return TreeTransport if num_ranks >= FROM_RANKS else PairwiseTransport


def goes_in_rounds(num_bytes: int, num_slices: int) -> bool:
    """Whether a bucket of so many bytes is small enough."""
    return num_slices > 1 and num_bytes <= min(STAGING_BYTES, num_slices * SLICE_BYTES)


class _Rounds:
    """A collective in rounds: messages with one number a level."""

    def __init__(self, transport: TreeTransport, num_bytes: int, kind: int, num_messages: int, what: str) -> None:
        self._transport = transport
        self._what = what
        self._tag = transport.take_tags(num_messages, kind, num_bytes)
        self._sends: list[PendingWork] = []

    def finish_sends(self) -> None:
        """Wait until all has been read that was sent."""
        for pending in self._sends:
            pending.finish()

    def _send(self, tensor: Tensor, place: int, number: int) -> None:
        works = self._transport.send({place: tensor}, self._tag + number)
        self._sends.append(PendingWork(self._what, works, (tensor,), group=self._transport.control.group))

    def _receive(self, tensor: Tensor, place: int, number: int) -> PendingWork:
        works = self._transport.receive({place: tensor}, self._tag + number)
        return PendingWork(self._what, works, (tensor,), group=self._transport.control.group)


class _Climb(_Rounds):
    """A reduce-scatter: up the tree."""

    def __init__(self, transport: TreeTransport, full: Tensor, out: Tensor, base: Tensor | None, label: str) -> None:
        what = f"transport {transport.name}, reduce-scatter of {label}"
        super().__init__(transport, full.nbytes, REDUCE, transport.num_levels, what)
        self._full, self._out, self._base, self._label = full.view(transport.num_slices, -1), out, base, label
        numel = self._full.size(1)
        memories = [_Memory(step, full.element_size(), numel) for step in transport.climb]
        self._staging = transport.staging.take(sum(memory.num_bytes for memory in memories))
        pieces = torch.split(self._staging[: sum(m.num_bytes for m in memories)], [m.num_bytes for m in memories])
        self._incoming, self._sums, self._arriving = [], [], []
        for step, memory, piece in zip(transport.climb, memories, pieces, strict=True):
            incoming, total = memory.cut(piece, full.dtype)
            self._incoming.append(incoming)
            self._sums.append(total)
            # All are there from the start on: what comes early need not wait.
            self._arriving.append(self._receive(incoming, step.source, step.level))

    def run(self) -> None:
        climb = self._transport.climb
        held = self._full
        for number, step in enumerate(climb):
            for place, rows in step.sends.items():
                self._send(rows.within(step.holds).of(held), place, step.level)
            kept, incoming = step.keeps.within(step.holds).of(held), self._incoming[number]
            self._arriving[number].finish()
            is_last = step is climb[-1]
            total = self._out.view(1, -1) if is_last else self._sums[number]
            with named_range("sum", self._label):
                _add(kept, incoming, total, self._base if is_last else None)
            held = total
        self.finish_sends()
        self._transport.staging.give_back(self._staging)


class _Descent(_Rounds):
    """An all-gather: down the tree."""

    def __init__(self, transport: TreeTransport, full: Tensor, label: str) -> None:
        what = f"transport {transport.name}, all-gather of {label}"
        super().__init__(transport, full.nbytes, GATHER, transport.num_levels, what)
        self._matrix = full.view(transport.num_slices, -1)
        self._arriving = [
            [self._arrival(rows, place, step.level) for place, rows in step.sends.items()]
            for step in reversed(transport.climb)
        ]

    def _arrival(self, rows: Rows, place: int, level: int) -> tuple[Rows, Tensor, PendingWork]:
        arrived = rows.of(self._matrix)  # in place, where it is a view
        return rows, arrived, self._receive(arrived, place, level)

    def run(self) -> None:
        for step, arriving in zip(reversed(self._transport.climb), self._arriving, strict=True):
            self._send(step.keeps.of(self._matrix), step.source, step.level)
            for rows, arrived, pending in arriving:
                pending.finish()
                if not rows.are_consecutive:
                    self._matrix[list(rows.numbers)] = arrived
        self.finish_sends()


class _Spread(_Rounds):
    """What every rank has to know: told on over distances that double.

    Attributes:
        distances: 1, 2, 4, ... places.
    """

    def __init__(self, transport: TreeTransport, tensor: Tensor, kind: int, what: str) -> None:
        super().__init__(transport, tensor.nbytes, kind, transport.num_levels, what)
        self.distances = [1 << level for level in range(transport.num_levels)]

    def swap(self, number: int, distance: int, known: Tensor) -> Tensor:
        """Tell the rank so many places on, and hear as much from that as many places back."""
        place, size = self._transport.place, self._transport.num_slices
        heard = torch.empty_like(known)
        arriving = self._receive(heard, (place - distance) % size, number)
        self._send(known, (place + distance) % size, number)
        arriving.finish()
        return heard


class _Memory:
    """What one round of a reduce-scatter takes: what comes in, and the sum where that is wider.

    Args:
        item_bytes: of the bucket's elements.
        numel: of a slice.
    """

    def __init__(self, step: Round, item_bytes: int, numel: int) -> None:
        self._shape = (len(step.keeps), numel)
        self._is_narrow = step.source_is_alone and item_bytes == 2
        elements = len(step.keeps) * numel
        wide = max(item_bytes, 4)
        self._incoming_bytes = elements * (item_bytes if self._is_narrow else wide)
        # A sum that is as wide takes the place of what has come in.
        self.num_bytes = _aligned(self._incoming_bytes) + (_aligned(elements * wide) if self._is_narrow else 0)

    def cut(self, memory: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The matrices of what comes in and of the sum, of a bucket of that dtype."""
        wide = _wide(dtype)
        incoming = memory[: self._incoming_bytes].view(dtype if self._is_narrow else wide).view(self._shape)
        if not self._is_narrow:
            return incoming, incoming
        rest = memory[_aligned(self._incoming_bytes) :]
        return incoming, rest.view(wide)[: incoming.numel()].view(self._shape)


def _add(mine: Tensor, theirs: Tensor, out: Tensor, base: Tensor | None) -> None:
    """Sum two matrices, in the wider of their dtypes. Of two numbers the order makes no difference."""
    if mine.dtype is not theirs.dtype:
        wide = _wide(mine.dtype)
        mine, theirs = mine.to(wide), theirs.to(wide)
    ops.reduce([mine.reshape(-1), theirs.reshape(-1)], out.view(-1), base=base)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums are kept."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64
