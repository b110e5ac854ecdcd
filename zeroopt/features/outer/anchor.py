"""The anchor of a bucket: the parameters that the ranks of the average group last had in common, and how they get new ones.

    this rank's parameters          ┌──────────────────────┐
    the anchor, on all ranks alike  └─ their difference ───┘  set_out   reduce-scatter: the differences of all ranks
                                             │
    the slice of this rank                 [ mean ]           step      outer gradient of a slice, outer step, all-gather
                                             │
    the anchor, on all ranks alike  ┌──── new values ──────┐  arrive    and what becomes of the parameters
                                    └──────────────────────┘

What the outer optimizer keeps is kept once in the average group, a slice on each rank; the anchor is on all of them.

Where outer gradients and steps travel rounded, all ranks add the same rounded step to the anchor, so that it stays the same on
all of them, and whoever stepped a slice keeps it exactly: what rounding took goes along with the next step.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor, nn

from ...collectives import PendingCollective, Transport, Wire
from ...collectives.base import slice_of
from ...pages import paged_zeros
from ...plan.params import ParamState
from ...probing.probe import is_per_element
from ...storage.bucket import Bucket
from ...storage.segment import Segment
from .exchange_buffers import ExchangeBuffers
from .optimizer import is_number

_SLICE_MULTIPLE = 256  # elements: whatever a wire takes together, and what kernels like to begin at


class Stage(IntEnum):
    """How far a bucket has come on its way."""

    AT_REST = 0
    SUMMING = 1
    GATHERING = 2
    ARRIVED = 3


class Anchor:
    """That of one bucket's own range.

    Attributes:
        bucket: whose parameters it was, or is to become.
        values: [number of slices times their length], at home; what is behind the own range is zero.
        param: the slice that the outer optimizer steps here; a part of `values`, or exact where those are not.
        is_set: there are values.
        stage: how far it has come.
    """

    def __init__(self, bucket: Bucket, transport: Transport, buffers: ExchangeBuffers, wire: Wire) -> None:
        self.bucket = bucket
        self.is_set = False
        self.stage = Stage.AT_REST
        self._transport, self._buffers, self._wire = transport, buffers, wire
        self._numel = bucket.own_param.numel()
        dtype = anchor_dtype(bucket)
        self._wire_dtype = wire.dtype or dtype
        self._is_lossy = is_rounded(wire, dtype)
        padded = padded_numel(self._numel, transport.num_slices)
        self.values = paged_zeros(padded, dtype, bucket.home)
        mine = transport.own_slice(self.values)
        self.param = nn.Parameter(paged_zeros(mine.numel(), dtype, bucket.home) if self._is_lossy else mine)
        self._label = f"{bucket.name}, outer step"
        buffers.most = max(buffers.most, padded * self._wire_dtype.itemsize)

    def take_over(self) -> None:
        """Let the anchor be the parameters of this rank."""
        self.values[: self._numel].copy_(self._own())
        self.settle()

    def settle(self) -> None:
        """The anchor has been written, and holds."""
        if self._is_lossy:
            self.param.detach().copy_(self._transport.own_slice(self.values))
        self.is_set = True

    def set_out(self, *, contributes: bool, contributors: int) -> None:
        """Let the outer gradient travel. Collective.

        Args:
            contributes: whether this rank has trained since.
            contributors: how many ranks have.
        """
        assert self.stage is Stage.AT_REST
        self._contributors = contributors
        num_bytes = self.values.numel() * self._wire_dtype.itemsize
        self._buffer = self._buffers.take(num_bytes)
        full = self._buffer[:num_bytes].view(self._wire_dtype)
        own = full[: self._numel]
        if contributes:
            own.copy_(self.values[: self._numel] - self._own())
        else:
            own.zero_()
        full[self._numel :].zero_()
        self._travelling = self._wire.encode(full, self._transport.num_slices)
        self._sum = torch.empty(self.param.numel(), dtype=self.param.dtype, device=full.device)
        self._reducing: PendingCollective = self._transport.start_reduce_scatter(
            self._travelling, self._sum, wire=self._wire, label=self._label
        )
        self.stage = Stage.SUMMING

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the outer step of this rank's slice, and let what comes of it travel, where the outer gradient does. Collective."""
        if self.stage is not Stage.SUMMING:
            return
        self._reducing.finish()
        self.param.grad = self._sum.div_(self._contributors).to(self.param.device)
        optimizer.step()
        self.param.grad = None
        # Others write their slices of this buffer, each of which they alone have read.
        self._transport.own_slice(self._travelling).copy_(self._encoded_step())
        self._gathering = self._transport.start_all_gather(self._travelling, label=self._label)
        self._transport.flush()
        self.stage = Stage.GATHERING

    def _encoded_step(self) -> Tensor:
        """What the others have to know of this rank's slice."""
        if not self._is_lossy:
            return self.param.detach()
        step = self.param.detach() - self._transport.own_slice(self.values)
        return self._wire.encode(step.to(self._sum.device, self._wire_dtype), 1)

    def collect(self) -> None:
        """Let the anchor be what the ranks have made of it, where that is on its way. Collective."""
        if self.stage is not Stage.GATHERING:
            return
        self._gathering.finish()
        self._reducing.wait_until_read()
        travelled = self._travelling.to(self.values.device)
        if self._is_lossy:
            slices = self._transport.num_slices
            for number in range(slices):
                values = slice_of(self.values, number, slices)
                self._wire.combine([slice_of(travelled, number, slices)], values, values)
        else:
            self.values.copy_(travelled)
        self._buffers.give_back(self._buffer)
        del self._buffer, self._travelling, self._sum, self._reducing, self._gathering
        self.stage = Stage.ARRIVED

    def arrive(self, kept: float) -> None:
        """Let the parameters be the anchor, where it has been on its way. Collective.

        Args:
            kept: how much of this rank's own parameters stays.
        """
        self.collect()
        if self.stage is Stage.ARRIVED:
            self.stage = Stage.AT_REST
            self.become_parameters(kept)

    def become_parameters(self, kept: float = 0.0) -> None:
        """Let the parameters be the anchor. They have to be gathered."""
        values = self.values[: self._numel]
        self.bucket.master.write(0, self._numel, values.lerp(self._own(), kept) if kept else values)

    def _own(self) -> Tensor:
        """This rank's parameters as exact as they are kept; mostly what is stored itself."""
        return self.bucket.master.exact().to(self.values.dtype)

    def digest(self) -> int:
        """Of the values: on ranks with the same anchor the same."""
        bits = self.values.view(torch.int32 if self.values.dtype.itemsize == 4 else torch.int64)
        return int(bits.sum(dtype=torch.int64))

    def gather_state(self, optimizer: torch.optim.Optimizer) -> ParamState:
        """All that belongs to outer steps of the own range, numbers included. Collective."""
        state = {"exact": self.param.detach(), **optimizer.state.get(self.param, {})}
        if not self._is_lossy:
            del state["exact"]
        gathered: ParamState = {"anchor": self.values[: self._numel]}
        for name, value in sorted(state.items()):
            if is_per_element(name, value, self.param):
                everyone = self._transport.control.gather(value.to(self.bucket.device), "gathering the outer state")
                gathered[name] = everyone.view(-1)[: self._numel].to(self.values.device)
            elif is_number(value):
                gathered[name] = {"number": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
            else:
                gathered[name] = value
        return gathered

    def load_state(self, optimizer: torch.optim.Optimizer, pieces: dict[Segment, ParamState], *, arrived: bool) -> None:
        """Take over what was gathered, of whichever run, in pieces. Where there is no anchor in it, begin anew.

        Args:
            pieces: of the segments of the bucket that there are any of.
            arrived: whether the anchor has yet to become the parameters.
        """
        optimizer.state.pop(self.param, None)
        # Of padding alone nothing is saved.
        self.is_set = not self.bucket.segments or any("anchor" in piece for piece in pieces.values())
        self.stage = Stage.ARRIVED if self.is_set and arrived else Stage.AT_REST
        if not self.is_set:
            return
        self.values[: self._numel].copy_(self._own())  # of segments that were not saved
        state: ParamState = {}
        whole = {"anchor": self.values}
        for segment, piece in pieces.items():
            for name, value in piece.items():
                if isinstance(value, dict):
                    state[name] = torch.tensor(value["number"], dtype=getattr(torch, value["dtype"]), device="cpu")
                elif not isinstance(value, Tensor):
                    state[name] = value
                else:
                    array = whole.setdefault(name, torch.zeros_like(self.values))
                    segment.part_of(array).copy_(segment.flatten(value))
        self.settle()
        exact = whole.pop("exact", None)
        if self._is_lossy and exact is not None:
            self.param.detach().copy_(self._transport.own_slice(exact))
        del whole["anchor"]
        state |= {name: self._transport.own_slice(array).clone() for name, array in whole.items()}
        if state:
            optimizer.state[self.param] = state


def anchor_dtype(bucket: Bucket) -> torch.dtype:
    """In what the anchor of a bucket is kept."""
    exact = bucket.master.dtype
    return torch.float32 if exact.itemsize == 2 else exact


def is_rounded(wire: Wire, dtype: torch.dtype) -> bool:
    """Whether a wire rounds values of a dtype."""
    return wire.dtype not in (None, dtype) or type(wire).encode is not Wire.encode


def padded_numel(numel: int, num_slices: int) -> int:
    """Elements of an own range of `numel` in equal slices that everything can begin at. None is empty: no transport moves nothing, and
    a rank may own none of a bucket's whole parameters."""
    slice_numel = max(1, -(-numel // num_slices))
    return num_slices * (-(-slice_numel // _SLICE_MULTIPLE) * _SLICE_MULTIPLE)
