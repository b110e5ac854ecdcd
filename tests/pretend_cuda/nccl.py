"""A process group that does what NCCL does, between ranks that are threads of one process.

A collective runs on a stream of its communicator, behind what the current stream has been given so far. The host never waits:
`Work.wait` has the current stream wait. All ranks of a communicator start the same collectives in the same order; where they do
not, NCCL hangs or mixes up what it sends, until its watchdog ends the process, and here every rank raises.

Messages go as torch's NCCL has them go where a group has not been bound to a device: those between two ranks on a stream of the two, one
after the other in either direction, whatever their tags, so that two ranks which both send first wait for each other for ever; those of
`batch_isend_irecv` on the stream of the collectives, all at once.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import _device
import torch
import torch.distributed as dist
from torch import Tensor

from .surface import stream_of

TIMEOUT_S = 120.0
keeps_by_record_stream = False
"""Tensors are told to the allocator, as torch's NCCL did before 2.8: their memory comes back late. Else whoever waits keeps them."""

NO_HOST = -1  # whoever comes last lets a collective run, which waits for nothing that this rank's host has waited for
_communicators: dict[int, Communicator] = {}
_numbers = itertools.count(1)


def on_cpu(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as the CPU sees it."""
    assert tensor.is_contiguous(), "NCCL takes contiguous tensors"
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


@dataclass
class Call:
    """A rank's part of a collective.

    Attributes:
        name: of the collective, and whatever else all ranks have to agree on.
        move: what it does, given the inputs and outputs of all ranks.
    """

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    move: Callable[[list[list[Tensor]], list[list[Tensor]]], None]

    @property
    def device(self) -> int:
        return next(tensor.device.index for tensor in (*self.inputs, *self.outputs))


@dataclass
class Round:
    """One collective, or message, from the first rank that starts it until it has run."""

    ranks: tuple[int, ...]
    channel: Any
    calls: dict[int, Call] = field(default_factory=dict)
    begins: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    streams: dict[int, int] = field(default_factory=dict)
    captures: dict[int, int] = field(default_factory=dict)
    error: str = ""

    @property
    def is_through(self) -> bool:
        return bool(self.error) or len(self.ends) == len(self.ranks)


@dataclass
class Part:
    """What a rank does in a round.

    Attributes:
        ranks: of the round.
        channel: whose rounds are told apart by their order alone.
    """

    call: Call
    ranks: tuple[int, ...]
    channel: Any = "all"


class Communicator:
    """The ranks of one group, each with streams on each device that it uses: a lane has one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._streams: dict[tuple[int, int, Any], int] = {}
        self._condition = threading.Condition()
        self._rounds: dict[Any, Round] = {}
        self._counts: defaultdict[Any, int] = defaultdict(int)
        self._last: dict[tuple[int, Any], list[Round]] = {}  # that were started, by rank and lane
        self._actors: defaultdict[Any, int] = defaultdict(lambda: next(_numbers))  # of the trace, by channel

    def start(self, rank: int, parts: Sequence[Part], lane: Any = "collectives") -> list[Round]:
        """Start a rank's parts of rounds, the next ones of their channels, all at once, behind what it has started on that lane."""
        with self._condition:
            for before in self._last.get((rank, lane), []):
                self.wait(before)
            self._last[rank, lane] = [self._enter(rank, part, lane) for part in parts]
            return self._last[rank, lane]

    def _enter(self, rank: int, part: Part, lane: Any) -> Round:
        call, number = part.call, self._counts[rank, part.channel]
        self._counts[rank, part.channel] += 1
        round_ = self._rounds.setdefault((part.channel, number), Round(part.ranks, part.channel))
        round_.begins[rank] = self._begin(rank, call.device, lane)
        stream = self._streams[rank, call.device, lane]
        round_.streams[rank] = stream
        round_.captures[rank] = _device.capture_of(call.device, stream)
        if keeps_by_record_stream:
            for tensor in (*call.inputs, *call.outputs):
                tensor.record_stream(stream_of(call.device, stream))
        round_.calls[rank] = call
        if len(round_.calls) == len(part.ranks):
            self._run(round_)
            self._condition.notify_all()
        return round_

    def wait(self, round_: Round) -> None:
        """Until all ranks have started it: of this, a program on real devices sees nothing."""
        with self._condition:
            if not self._condition.wait_for(lambda: round_.is_through, TIMEOUT_S):
                missing = sorted(set(round_.ranks) - set(round_.calls))
                name = next(iter(round_.calls.values())).name
                round_.error = f"watchdog: ranks {missing} have not started {name} within {TIMEOUT_S:.0f} s"
            if round_.error:
                raise RuntimeError(round_.error)

    def _begin(self, rank: int, device: int, lane: Any) -> int:
        number = _device.current_stream(device)
        after = [_device.last(_device.stream_actor(device, number))]
        if (rank, device, lane) not in self._streams:
            self._streams[rank, device, lane] = _device.new_stream(device)
        stream = self._streams[rank, device, lane]
        _device.come_behind(_device.capture_of(device, number), device, stream)
        actor = _device.stream_actor(device, stream)
        return _device.add(_device.Kind.MARK, actor, device, "NCCL begins", [], after, None)

    def _run(self, round_: Round) -> None:
        names = {rank: round_.calls[rank].name for rank in round_.ranks}
        if len(set(names.values())) > 1:
            round_.error = f"watchdog: ranks have started different collectives as one: {names}"
            return
        calls = [round_.calls[rank] for rank in round_.ranks]
        inputs = [list(map(on_cpu, call.inputs)) for call in calls]
        outputs = [list(map(on_cpu, call.outputs)) for call in calls]

        move = calls[0].move

        def action() -> bool:
            move([[tensor.clone() for tensor in row] for row in inputs], outputs)
            return True

        action()
        round_.calls = {rank: replace(call, inputs=[], outputs=[]) for rank, call in round_.calls.items()}
        ranges = [
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, is_write)
            for is_write, rows in ((False, inputs), (True, outputs))
            for tensor in itertools.chain(*rows)
        ]
        begins = list(round_.begins.values())
        kind = _device.Kind.COLLECTIVE
        actor = _device.stream_actor(-1, self._actors[round_.channel])
        run = _device.add(kind, actor, NO_HOST, calls[0].name, ranges, begins, action)
        for rank, call in zip(round_.ranks, calls, strict=True):
            actor = _device.stream_actor(call.device, round_.streams[rank])
            round_.ends[rank] = _device.add(_device.Kind.MARK, actor, NO_HOST, "NCCL ends", [], [run], None)


class PretendWork(dist.Work):
    """Keeps its tensors until it is waited for, as torch's has done since 2.8."""

    def __init__(
        self,
        communicator: Communicator,
        rounds: Sequence[Round],
        rank: int,
        calls: Sequence[Call],
        host_waits: bool = False,
    ) -> None:
        super().__init__()
        self._communicator = communicator
        self._rounds = rounds
        self._rank = rank
        self._host_waits = host_waits
        self._device = calls[0].device
        kept = [tensor for call in calls for tensor in (*call.inputs, *call.outputs)]
        self._kept = [] if keeps_by_record_stream else kept

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        device = self._device
        number = _device.current_stream(device)
        for round_ in self._rounds:
            self._communicator.wait(round_)
            _device.come_behind(round_.captures[self._rank], device, number)
        ends = [round_.ends[self._rank] for round_ in self._rounds]
        actor = _device.stream_actor(device, number)
        _device.add(_device.Kind.WAIT, actor, device, "wait for NCCL", [], ends, None)
        if self._host_waits:
            _device.host_waits(device, number, "barrier")
        self._kept.clear()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return all(round_.is_through for round_ in self._rounds)


def _sum(op: Any, tensors: Sequence[Tensor]) -> Tensor:
    """In the dtype that travels, one after the other."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        if op == dist.ReduceOp.MAX:
            total = torch.maximum(total, tensor)
        elif op == dist.ReduceOp.MIN:
            total = torch.minimum(total, tensor)
        else:
            assert op == dist.ReduceOp.SUM, f"no {op} here"
            total += tensor
    return total


def _all_reduce(op: Any, inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> None:
    total = _sum(op, [row[0] for row in inputs])
    for (out,) in outputs:
        out.copy_(total)


def _reduce_scatter(op: Any, inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> None:
    """As a ring does it: each slice ends at its owner, beginning with the rank behind it."""
    size = len(outputs)
    for rank, (out,) in enumerate(outputs):
        parts = [inputs[(rank + 1 + k) % size][0].view(size, -1)[rank] for k in range(size)]
        out.view(-1).copy_(_sum(op, parts))


def _all_gather(inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> None:
    for row in outputs:
        parts = row if len(row) > 1 or len(inputs) == 1 else row[0].view(len(inputs), -1).unbind()
        for part, (source,) in zip(parts, inputs, strict=True):
            part.view(-1).copy_(source.view(-1))


def _pieces(flat: Tensor, splits: list[int], size: int) -> list[Tensor]:
    """Of an all-to-all, by rank; equal ones where no splits are given."""
    return list(flat.split(splits) if splits else flat.view(size, -1).unbind())


def _all_to_all(inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> None:
    for rank, parts in enumerate(outputs):
        for part, sent in zip(parts, inputs, strict=True):
            part.copy_(sent[rank])


def _broadcast(root: int, inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> None:
    for (out,) in outputs:
        out.copy_(inputs[root][0])


def _gather(root: int, inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> None:
    for part, (source,) in zip(outputs[root], inputs, strict=True):
        part.copy_(source)


def _scatter(root: int, inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> None:
    for (out,), part in zip(outputs, inputs[root], strict=True):
        out.copy_(part)


def _send(inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> None:
    (source,) = [tensor for row in inputs for tensor in row]
    (target,) = [tensor for row in outputs for tensor in row]
    target.view(-1).copy_(source.view(-1))


class PretendNccl(dist.ProcessGroup):
    """torch.distributed's view of a communicator, of one rank."""

    def __init__(self, communicator: Communicator, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._communicator = communicator
        self._size = size
        self._batch: list[Part] | None = None

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return "pretend_nccl"

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cuda")]

    @property
    def pg_name(self) -> str:
        name: str = dist.distributed_c10d._world.pg_names[self]
        return name

    @property
    def group_name(self) -> str:
        return self.pg_name

    def _get_backend(self, device: torch.device) -> PretendNccl:
        return self

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return True

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def _start(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], move: Any, **waits: bool
    ) -> PretendWork:
        tensors = [*inputs, *outputs]
        for tensor in tensors:
            assert tensor.is_cuda, f"NCCL takes CUDA tensors, got one on {tensor.device} for {name}"
        call = Call(name, list(inputs), list(outputs), move)
        rounds = self._communicator.start(self.rank(), [Part(call, tuple(range(self._size)))])
        return PretendWork(self._communicator, rounds, self.rank(), [call], **waits)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> PretendWork:
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        name = f"all_reduce of {tensors[0].numel()} {tensors[0].dtype}, {op.op}"
        return self._start(name, tensors, tensors, partial(_all_reduce, op))

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> PretendWork:
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        name = f"reduce_scatter of {input.numel()} {input.dtype}"
        return self._start(name, [input], [output], partial(_reduce_scatter, op))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> PretendWork:
        return self._start(f"all_gather of {output.numel()} {output.dtype}", [input], [output], _all_gather)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> PretendWork:
        return self._start(f"all_gather of {inputs[0].numel()} {inputs[0].dtype}", inputs, outputs[0], _all_gather)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> PretendWork:
        sent, received = _pieces(input, input_splits, self.size()), _pieces(output, output_splits, self.size())
        what = f"pieces of {input.dtype}" if input_splits else f"{input.numel()} {input.dtype}"
        return self._start(f"all_to_all of {what}", sent, received, _all_to_all)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> PretendWork:
        root = opts.rootRank
        name = f"broadcast of {tensors[0].numel()} {tensors[0].dtype} from {root}"
        return self._start(name, tensors, tensors, partial(_broadcast, root))

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> PretendWork:
        flat = outputs[0] if outputs else []
        root = opts.rootRank
        return self._start(f"gather to {root}", inputs, flat, partial(_gather, root))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> PretendWork:
        flat = inputs[0] if inputs else []
        root = opts.rootRank
        return self._start(f"scatter from {root}", flat, outputs, partial(_scatter, root))

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> PretendWork | None:
        return self._message(self.rank(), to, tensors, [])

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> PretendWork | None:
        return self._message(source, self.rank(), [], tensors)

    def _message(self, source: int, to: int, inputs: list[Tensor], outputs: list[Tensor]) -> PretendWork | None:
        """Starts it, unless it belongs to a batch."""
        (tensor,) = *inputs, *outputs
        call = Call(f"message of {tensor.nbytes} bytes from {source} to {to}", inputs, outputs, _send)
        pair = tuple(sorted((source, to)))
        if self._batch is not None:
            self._batch.append(Part(call, pair, ("batch", source, to)))
            return None
        rounds = self._communicator.start(self.rank(), [Part(call, pair, pair)], lane=pair)
        return PretendWork(self._communicator, rounds, self.rank(), [call])

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch = []

    def _end_coalescing(self, device: torch.device) -> PretendWork:
        parts, self._batch = self._batch or [], None
        rounds = self._communicator.start(self.rank(), parts)
        return PretendWork(self._communicator, rounds, self.rank(), [part.call for part in parts])

    def barrier(self, opts: Any = None) -> PretendWork:
        flag = torch.zeros(1, device="cuda")
        return self._start("barrier", [flag], [flag], partial(_all_reduce, dist.ReduceOp.SUM), host_waits=True)


def batch_isend_irecv(ops: list[dist.P2POp]) -> list[Any]:
    """torch's, which has only groups of its own class send all at once."""
    group = ops[0].group or dist.group.WORLD
    with dist.distributed_c10d._coalescing_manager(group, ops[0].tensor.device, async_ops=True) as batch:
        for op in ops:
            peer = {"group_dst" if op.op is dist.isend else "group_src": op.group_peer}
            op.op(op.tensor, group=op.group, tag=op.tag, **peer)
    return batch.works


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> PretendNccl:
    """All ranks of a group find the same communicator by a number in its store."""
    if rank == 0:
        number = next(_numbers)
        _communicators[number] = Communicator(size)
        store.set("communicator", str(number))
    communicator = _communicators[int(store.get("communicator"))]
    dist.distributed_c10d._store_based_barrier(rank, store, "joined", size, timeout)
    return PretendNccl(communicator, rank, size)


dist.batch_isend_irecv = batch_isend_irecv
dist.Backend.register_backend("pretend_nccl", _create, devices=["cuda"])
