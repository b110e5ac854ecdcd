"""The arrays that a step works on, checked once for the many steps that use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, StateError
from ..streams import ReadByGraphs
from ..transfers import upload_into
from .checks import (
    GRAD_COLUMN,
    GROUP_COLUMN,
    NUMEL_COLUMN,
    ROW_COLUMNS,
    STATE_COLUMN,
    check_device,
    check_flat,
    check_none_overlap,
    check_not_negated,
    dtype_code,
    is_dense,
    require,
)
from .devices import require_kernels
from .storage import Storage, num_blocks

MAX_STATES = 3


@dataclass(frozen=True, eq=False)
class SegmentArrays:
    """A piece of one parameter with all that belongs to it. All arrays are 1-D, contiguous and of one size.

    Attributes:
        param: of `Storage.param_dtype`; stepped in place.
        grad: of `Storage.grad_dtype`, only read. None: set later, by `SegmentTable.set_grads`.
        master: of `Storage.master_dtype`.
        states: in the order of the op's documentation; None for a state that the group does not use.
        scales: float32, one element for every 256 begun ones of the state; for 8-bit states only.
        group: row of the table of hyper-parameters.
        key: the parameter's number, below 2**32, and
        first: the element of the parameter that the piece begins with, below 2**60: what random numbers depend on besides seed
            and step, so that they do not depend on how a parameter is cut.
    """

    param: Tensor
    grad: Tensor | None = None
    master: Tensor | None = None
    states: Sequence[Tensor | None] = ()
    scales: Sequence[Tensor | None] = ()
    group: int = 0
    key: int = 0
    first: int = 0


@dataclass(eq=False, repr=False)
class SegmentTable:
    """Segments whose dtypes, sizes, devices and memory have been checked, as the table that kernels read.

    It keeps their arrays alive.

    Args:
        storage: how all of them are stored.
        segments: at least one for a table on a CUDA device.
        signed: for each state whether it can be negative, as the op's documentation says; 8-bit states depend on it.

    Raises:
        ConfigError: an array cannot be right, or two overlap.
        KernelUnavailableError: there are no kernels for the device.
    """

    storage: Storage
    segments: Sequence[SegmentArrays]
    signed: Sequence[bool] = (True, False, False)
    rows: Tensor = field(init=False)
    device: torch.device = field(init=False)
    total_numel: int = field(init=False)
    num_groups: int = field(init=False)

    def __post_init__(self) -> None:
        self._read_by_graphs = ReadByGraphs()
        self.device = self.segments[0].param.device if self.segments else torch.device("cpu")
        self._numels = [segment.param.numel() for segment in self.segments]
        self.total_numel = sum(self._numels)
        self.num_groups = max((segment.group for segment in self.segments), default=-1) + 1
        for number, segment in enumerate(self.segments):
            self._check(f"segments[{number}]", segment)
        self._check_disjoint()
        require_kernels(self.device)
        self._host = torch.zeros(len(self.segments), ROW_COLUMNS, dtype=torch.int64, device="cpu")
        self._table = self._host.numpy()
        for row, segment in zip(self._table, self.segments, strict=True):
            row[:] = _row(segment)
        self._upload()

    @property
    def groups(self) -> NDArray[np.int64]:
        """[n], the group of each segment."""
        return self._table[:, GROUP_COLUMN]

    @property
    def lacks_grad(self) -> NDArray[np.bool_]:
        """[n], whether a segment has no gradient."""
        result: NDArray[np.bool_] = self._table[:, GRAD_COLUMN] == 0
        return result

    def lacks_state(self, state: int) -> NDArray[np.bool_]:
        """[n], whether a segment has no such state."""
        result: NDArray[np.bool_] = self._table[:, STATE_COLUMN + state] == 0
        return result

    def set_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Take other gradients from now on. The caller keeps them alive until the step is done.

        Args:
            grads: for each segment a dense tensor, of the dtype and device of the table's storage, whose elements lie in memory
                as those of the segment do, apart from what a step writes; None for segments that will be inactive.

        Raises:
            ConfigError: a gradient cannot be right.
            StateError: a CUDA graph is captured, and gradients lie elsewhere than before. Nothing has been changed in either case.
        """
        require(
            len(grads) == len(self._numels),
            f"expected a gradient or None for each of {len(self._numels)} segments, got {len(grads)}",
        )
        addresses = []
        for number, (grad, numel) in enumerate(zip(grads, self._numels, strict=True)):
            if grad is None:
                addresses.append(0)
                continue
            # Compared first and worded only when they differ: this runs for every parameter in every step.
            if grad.dtype is not self.storage.grad_dtype or grad.numel() != numel or grad.device != self.device:
                raise ConfigError(
                    f"expected grads[{number}] to have {numel} elements of {self.storage.grad_dtype} on {self.device}, got "
                    f"{grad.numel()} of {grad.dtype} on {grad.device}"
                )
            check_not_negated(f"grads[{number}]", grad)
            if not is_dense(grad):
                raise ConfigError(f"expected grads[{number}] to be dense in memory, got strides {grad.stride()}")
            addresses.append(grad.data_ptr())
        if self._table[:, GRAD_COLUMN].tolist() != addresses:
            self._check_apart(np.array(addresses, dtype=np.int64))
            before = self._table[:, GRAD_COLUMN].copy()
            self._table[:, GRAD_COLUMN] = addresses
            try:
                self._upload()
            except StateError:
                self._table[:, GRAD_COLUMN] = before  # the device still has those
                raise

    def _check_apart(self, addresses: NDArray[np.int64]) -> None:
        """Raise ConfigError where a gradient, at 0 where there is none, lies upon what a step writes."""
        ends = addresses + self._table[:, NUMEL_COLUMN] * self.storage.grad_dtype.itemsize
        # Of the arrays, which lie apart, the first that ends behind a gradient's beginning is the first that it can meet.
        found = np.searchsorted(self._written_ends, addresses, side="right")
        begins = np.append(self._written_begins, np.iinfo(np.int64).max)[found]
        if (meets := (addresses != 0) & (begins < ends)).any():
            number = int(meets.argmax())
            raise ConfigError(f"expected grads[{number}] not to overlap in memory with what a step writes; clone it")

    def _upload(self) -> None:
        if self.device.type == "cpu":
            self.rows = self._host
            return
        rows = torch.empty_like(self._host, device=self.device)  # not those of before, which a CUDA graph may read
        upload_into(rows, self._host)
        self.rows = rows

    def note_launch(self) -> None:
        """A kernel reads the rows on the current stream of the table's device, and does so again when a CUDA graph is replayed."""
        self._read_by_graphs.note(self.rows, self.device)

    def _check(self, name: str, segment: SegmentArrays) -> None:
        numel = segment.param.numel()
        require(numel > 0, f"expected {name} to have at least one element")
        most = min(MAX_STATES, len(self.signed))
        require(
            len(segment.states) <= most and len(segment.scales) <= most,
            f"expected {name} to have at most {most} states, got {max(len(segment.states), len(segment.scales))}",
        )
        dtype_code(f"{name}.param", segment.param)
        for what, array, dtype in self._expected(name, segment):
            if array is None:
                continue
            if array.dtype is not dtype:
                raise ConfigError(f"expected {what} to be {dtype}, got {array.dtype}")
            check_flat(what, array, num_blocks(numel) if "scales" in what else numel)
            check_device(what, array, self.segments[0].param)
        needs_master = self.storage.master_dtype is not None
        require(
            (segment.master is not None) == needs_master,
            f"expected {name}.master to be {f'a tensor of {self.storage.master_dtype}' if needs_master else None} for "
            f"{self.storage.param_dtype} parameters with master_weights={self.storage.master_weights!r}",
        )
        present = [state is not None for state in segment.states]
        scaled = [scale is not None for scale in segment.scales]
        require(
            scaled == (present if self.storage.has_scales else []),
            f"expected {name} to have scales for every state if states are int8, and none otherwise",
        )
        require(segment.group >= 0, f"expected {name} to have a group of at least 0, got {segment.group}")
        for what, value, end in (("key", segment.key, 2**32), ("first element", segment.first, 2**60)):
            require(0 <= value < end, f"expected {name} to have a {what} of at least 0 and below {end}, got {value}")

    def _expected(self, name: str, segment: SegmentArrays) -> Iterator[tuple[str, Tensor | None, torch.dtype | None]]:
        """Every array of a segment with its name and the dtype that it should have."""
        yield f"{name}.param", segment.param, self.storage.param_dtype
        yield f"{name}.grad", segment.grad, self.storage.grad_dtype
        yield f"{name}.master", segment.master, self.storage.master_dtype
        for k, state in enumerate(segment.states):
            yield f"{name}.states[{k}]", state, self.storage.dtype_of_state(signed=self.signed[k])
        for k, scale in enumerate(segment.scales):
            yield f"{name}.scales[{k}]", scale, torch.float32

    def _check_disjoint(self) -> None:
        arrays = [
            (what, array)
            for number, segment in enumerate(self.segments)
            for what, array, _ in self._expected(f"segments[{number}]", segment)
            if array is not None
        ]
        check_none_overlap(arrays)
        written = sorted(
            (array.data_ptr(), array.data_ptr() + array.nbytes) for what, array in arrays if not what.endswith(".grad")
        )
        self._written_begins, self._written_ends = np.array(written, dtype=np.int64).reshape(-1, 2).T


def _row(segment: SegmentArrays) -> list[int]:
    return [
        segment.param.numel(),
        segment.group,
        segment.key,
        segment.first,
        segment.param.data_ptr(),
        _address(segment.master),
        _address(segment.grad),
        *_addresses(segment.states),
        *_addresses(segment.scales),
    ]


def _addresses(arrays: Sequence[Tensor | None]) -> list[int]:
    return [_address(array) for array in arrays] + [0] * (MAX_STATES - len(arrays))


def _address(array: Tensor | None) -> int:
    return 0 if array is None else array.data_ptr()
