"""The small things that ranks of one process group tell each other: all that is not a bucket.

Everything is told by the rank in that group, and whatever fails says what was going on, for want of which rank, and what to
do, as transports do. Alone in its group, a rank has the answers at once: no backend is asked, so there need not be one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import backends_of
from .failure import the_other_rank
from .flat import group_alike, pieces_of
from .lone import lone_group
from .lost import has_gloo, named_failures
from .pending import Done, PendingCollective, PendingWork, start_message
from .pickled import check_on_cpu, pickled, unpickled
from .renamed import all_gather_flat

T = TypeVar("T")

_CPU = torch.device("cpu")
_TAG = 1 << 23  # of messages, out of the way of a user's own ones on the same group


class ControlGroup:
    """What the ranks of a process group tell each other.

    All methods are collective, in the order of calls, unless they say who takes part. `what` is going on, for messages. All of
    them raise CollectiveError when a rank does not do its part: it died, gave up, or the group's timeout went by; those that
    start something do so when it is finished. In what is pickled, tensors have to be on the CPU.

    Args:
        group: that this process is in.
        advice: what else to say where something fails.

    Attributes:
        group: the process group.
        rank: of this process in the group.
        size: number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup, *, advice: str = "") -> None:
        self.group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._advice = advice

    @property
    def device(self) -> torch.device:
        """Where small tensors lie that ranks compare: the CPU, where a backend of the group serves it."""
        served = backends_of(self.group)
        return torch.device("cpu" if not served or "cpu" in served else next(iter(served)))

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        """The tensors of all ranks, which have one shape and dtype, by rank: [size, *shape]."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        everyone = tensor.new_empty(self.size, *tensor.shape)
        if tensor.numel():
            # Of ten thousand ranks, a list of tensors takes longer to make than the numbers to travel.
            mine = tensor.reshape(-1)
            with self._named(what):
                work = all_gather_flat(everyone.view(-1), mine, group=self.group, async_op=True)
            self._pending(what, [(self._the_other, work)], (everyone, mine), mine.device).finish()
        return everyone

    def numbers(self, values: Sequence[int], what: str) -> list[list[int]]:
        """Integers of up to 64 bits of all ranks, as many on each, by rank."""
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        everyone: list[list[int]] = self.gather(mine, what).tolist()
        return everyone

    def objects(self, value: T, what: str) -> list[T]:
        """What all ranks have, by rank. It is pickled."""
        if self.size == 1:
            return [value]
        mine = pickled(value, what).to(self.device)
        lengths = [length for (length,) in self.numbers([mine.numel()], what)]
        padded = mine.new_zeros(max(lengths))
        padded[: mine.numel()] = mine
        return [unpickled(row[:length]) for row, length in zip(self.gather(padded, what), lengths, strict=True)]

    def collect(self, value: T, to: int, what: str) -> list[T] | None:
        """What all ranks have, by rank, on rank `to` alone; None elsewhere. It is pickled."""
        if self.size == 1:
            return [value]
        check_on_cpu(
            value, what
        )  # also on rank `to`, which sends nothing: ranks that fail alike do not wait for each other
        if has_gloo(self.group):
            return self._collect_messages(value, to, what)
        everyone: list[Any] | None = [None] * self.size if self.rank == to else None
        with self._named(what):
            dist.gather_object(value, everyone, dst=self._in_job(to), group=self.group)
        return everyone

    def _collect_messages(self, value: T, to: int, what: str) -> list[T] | None:
        """By Gloo, message by message: then it is known which rank is missing, and torch.distributed need not know the group any
        more, as after `destroy_process_group`."""
        if self.rank != to:
            self._send_pickled({to: value}, what)
            return None
        others = [rank for rank in range(self.size) if rank != to]
        told = self._receive_pickled(others, what)
        return [value if rank == to else told[rank] for rank in range(self.size)]

    def _send_pickled(self, values: Mapping[int, object], what: str) -> None:
        """Send a value to each of some ranks, which receive it by `_receive_pickled`."""
        messages = {rank: pickled(value, what) for rank, value in values.items()}
        lengths = {rank: torch.tensor(message.numel(), device="cpu") for rank, message in messages.items()}
        sent = [(rank, part) for parts in (lengths, messages) for rank, part in parts.items()]
        works = [(rank, start_message(self.group.send, _as_bytes(part), rank, _TAG)) for rank, part in sent]
        self._pending(what, works, sent, _CPU).finish()

    def _receive_pickled(self, sources: Sequence[int], what: str) -> dict[int, Any]:
        lengths = self._receive_each({rank: torch.tensor(0, device="cpu") for rank in sources}, what)
        messages = {rank: torch.empty(int(length), dtype=torch.uint8, device="cpu") for rank, length in lengths.items()}
        return {rank: unpickled(message) for rank, message in self._receive_each(messages, what).items()}

    def _receive_each(self, tensors: dict[int, Tensor], what: str) -> dict[int, Tensor]:
        works = [(rank, start_message(self.group.recv, _as_bytes(part), rank, _TAG)) for rank, part in tensors.items()]
        self._pending(what, works, tensors, _CPU).finish()
        return tensors

    def hand_out(self, values: Sequence[T] | None, source: int, what: str) -> T:
        """This rank's value of those that rank `source` has, one for each rank; the others pass None. It is pickled."""
        mine: list[Any] = [None] if values is None else [values[self.rank]]
        if self.size > 1:
            if has_gloo(self.group):
                return self._hand_out_messages(values, source, what)
            check_on_cpu(values, what)
            with self._named(what):
                # torch's annotation asks for a list, though it takes None where there is nothing to hand out.
                dist.scatter_object_list(mine, values, src=self._in_job(source), group=self.group)  # type: ignore[arg-type]
        value: T = mine[0]
        return value

    def _hand_out_messages(self, values: Sequence[T] | None, source: int, what: str) -> T:
        if self.rank != source:
            told: T = self._receive_pickled([source], what)[source]
            return told
        assert values is not None
        self._send_pickled({rank: value for rank, value in enumerate(values) if rank != source}, what)
        return values[source]

    def tell(self, value: T, source: int, what: str) -> T:
        """What rank `source` has. It is pickled."""
        if self.size == 1:
            return value
        message = pickled(value if self.rank == source else None, what).to(self.device)
        length = torch.tensor(message.numel(), device=self.device)
        self.broadcast([length], source, what)
        if self.rank != source:
            message = message.new_empty(int(length))
        self.broadcast([message], source, what)
        told: T = value if self.rank == source else unpickled(message)
        return told

    def total(self, tensor: Tensor, what: str) -> Tensor:
        """Sum a contiguous tensor over ranks, element by element, in place. Returns it."""
        self.start_total(tensor, what).finish()
        return tensor

    def largest(self, tensor: Tensor, what: str) -> Tensor:
        """Take the maximum of a contiguous tensor over ranks, element by element, in place. Returns it."""
        self.start_largest(tensor, what).finish()
        return tensor

    def first(self, is_one: bool, what: str) -> int | None:
        """The first rank for which something is true; None where it is for none."""
        place = torch.tensor(self.size - self.rank if is_one else 0, dtype=torch.int64, device=self.device)
        told = int(self.largest(place, what))
        return self.size - told if told else None

    def start_total(self, tensor: Tensor, what: str) -> PendingCollective:
        """Start what `total` does."""
        return self._start_all_reduce(tensor, dist.ReduceOp.SUM, what)

    def start_largest(self, tensor: Tensor, what: str) -> PendingCollective:
        """Start what `largest` does."""
        return self._start_all_reduce(tensor, dist.ReduceOp.MAX, what)

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor], source: int, what: str) -> None:
        """Overwrite tensors with those of rank `source`. All ranks pass the same shapes and dtypes.

        Those of one dtype and device travel together, for small messages cost more than a copy. One by itself is overwritten in
        place. Of DTensors, pass what ranks hold of them.
        """
        for alike in group_alike(tensors) if self.size > 1 else ():
            if len(alike) == 1 and alike[0].is_contiguous():
                self.start_broadcast(alike[0], source, what).finish()
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            self.start_broadcast(flat, source, what).finish()
            if self.rank != source:
                for tensor, piece in zip(alike, pieces_of(flat, alike), strict=True):
                    tensor.copy_(piece)

    def start_broadcast(self, tensor: Tensor, source: int, what: str) -> PendingCollective:
        """Start to overwrite one contiguous tensor with that of rank `source`."""
        if self.size == 1:
            return Done()
        with self._named(what):
            work = dist.broadcast(tensor, self._in_job(source), group=self.group, async_op=True)
        return self._pending(what, [(self._the_other, work)], tensor, tensor.device)

    def send(self, tensor: Tensor, to: Sequence[int], what: str) -> None:
        """Send a contiguous tensor to ranks that call `receive`. Returns when they may have received it all."""
        if tensor.numel():
            message = _as_bytes(tensor)
            works = [(rank, start_message(self.group.send, message, rank, _TAG)) for rank in to]
            self._pending(what, works, message, message.device).finish()

    def receive(self, tensor: Tensor, source: int, what: str) -> None:
        """Overwrite a contiguous tensor with what rank `source` sends to this one."""
        if tensor.numel():
            message = _as_bytes(tensor)
            works = [(source, start_message(self.group.recv, message, source, _TAG))]
            self._pending(what, works, message, message.device).finish()

    def pass_on(self, tensor: Tensor, ranks: Sequence[int], what: str) -> None:
        """Overwrite a contiguous tensor on some ranks with that of the first of them. They alone call it.

        Who has it sends it on, so that it takes as long as log2 of their number messages one after the other.
        """
        place = ranks.index(self.rank)
        source, targets = tree_links(place, len(ranks))
        if source is not None:
            self.receive(tensor, ranks[source], what)
        for target in targets:
            self.send(tensor, [ranks[target]], what)

    def barrier(self, what: str) -> None:
        """Return when all ranks have called it."""
        if self.size > 1:
            with self._named(what):
                work = dist.barrier(group=self.group, async_op=True)
            self._pending(what, [(self._the_other, work)], (), self.device).finish()

    def _start_all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, what: str) -> PendingCollective:
        if self.size == 1:
            return Done()
        with self._named(what):
            work = dist.all_reduce(tensor, op, group=self.group, async_op=True)
        return self._pending(what, [(self._the_other, work)], tensor, tensor.device)

    def _pending(
        self, what: str, works: Sequence[tuple[int | None, dist.Work]], keep: object, device: torch.device
    ) -> PendingCollective:
        return PendingWork(what, works, (keep,), self._advice, self.group, on_device=device.type != "cpu")

    @property
    def _the_other(self) -> int | None:
        return the_other_rank(self.group)

    def _named(self, what: str) -> AbstractContextManager[None]:
        return named_failures(what, self._the_other, self._advice, self.group)

    def _in_job(self, rank: int) -> int:
        """By which number torch.distributed's own functions know a rank of the group."""
        return dist.get_global_rank(self.group, rank)


def lone_control() -> ControlGroup:
    """That of a rank which has everything itself and needs nobody, whatever groups it is in."""
    return ControlGroup(lone_group())


def tree_links(place: int, size: int) -> tuple[int | None, list[int]]:
    """From whom, and to whom one after the other, in a binomial tree with its root at 0: a place's bits are the way to it.

    0 ─▶ 4 ─▶ 6 ─▶ 7
    │    └──▶ 5
    ├──▶ 2 ─▶ 3
    └──▶ 1
    """
    lowest = place & -place if place else 1 << size.bit_length()
    steps = [1 << bit for bit in reversed(range(lowest.bit_length() - 1))]
    return place - lowest if place else None, [place + step for step in steps if place + step < size]


def _as_bytes(tensor: Tensor) -> Tensor:
    """A view, since not every backend knows all dtypes."""
    return tensor.view(-1).view(torch.uint8)
