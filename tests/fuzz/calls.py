"""The functions of `zeroopt.ops`, called with whatever lies in one piece of memory.

A call raises an error of zeroopt's own and has written nothing, or it has written where it says and nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.draws import Draws
from zeroopt import ops
from zeroopt.errors import ZeroOptError

MEMORY_BYTES = 8192
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int64,
    torch.bool,
)
SIZES = (8, 0, 1, 3, 16, 255, 256, 257, 300)
SCALES = (1.0, 0.5, -2.0, float("inf"), float("nan"))


class Room:
    """Memory in which all tensors of a call lie.

    Attributes:
        written: those that the call may write.
    """

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.memory = torch.arange(MEMORY_BYTES).to(torch.uint8)
        self.written: list[Tensor] = []

    def any(self, expected: torch.dtype, numel: int, *, is_written: bool = False) -> Tensor:
        """Mostly a flat one of that dtype and size; otherwise of another dtype, shape or layout, or with the other sign."""
        draws = self.draws
        dtype = draws.one_of(DTYPES) if draws.below(8) == 7 else expected
        whole = self.memory.view(dtype)
        begin = draws.below(MEMORY_BYTES // 16) * 16 // dtype.itemsize + (draws.below(16) == 15)
        shape, strides = (numel,), (1,)
        if draws.below(8) == 7:
            shape = tuple(draws.one_of(SIZES) for _ in range(draws.below(4)))
            strides = tuple(draws.below(20) for _ in shape)
        last = begin + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
        if last >= whole.numel() or 0 in shape:
            begin, shape, strides = 0, (0,), (1,)
        tensor = whole.as_strided(shape, strides, begin)
        if draws.below(32) == 31 and dtype.is_floating_point:
            tensor = torch._neg_view(tensor)
        if is_written:
            self.written.append(tensor)
        return tensor

    def out(self, expected: torch.dtype, numel: int) -> Tensor:
        """One that the call may write."""
        return self.any(expected, numel, is_written=True)

    def maybe(self, expected: torch.dtype, numel: int, *, is_written: bool = False) -> Tensor | None:
        """One, or None."""
        return self.any(expected, numel, is_written=is_written) if self.draws.below(4) else None

    def numel(self) -> int:
        """Of most tensors of a call."""
        return self.draws.one_of(SIZES)

    def real(self) -> torch.dtype:
        """One of those that kernels know."""
        return self.draws.one_of(DTYPES[:4])


def _pack(room: Room) -> None:
    numel = room.numel()
    ops.pack(room.any(room.real(), numel), room.out(room.real(), numel), scale=room.draws.one_of(SCALES))


def _pack_segments(room: Room) -> None:
    src, dst = room.real(), room.real()
    numels = [room.numel() for _ in range(room.draws.below(4))]
    sources = [room.any(src, numel) for numel in numels]
    ops.pack_segments(sources, [room.out(dst, numel) for numel in numels], scale=room.draws.one_of(SCALES))


def _copy(room: Room) -> None:
    dtype, numel = room.draws.one_of(DTYPES), room.numel()
    ops.copy(room.any(dtype, numel), room.out(dtype, numel))


def _reduce(room: Room) -> None:
    dtype, of_out, numel = room.real(), room.real(), room.numel()
    slices = [room.any(dtype, numel) for _ in range(room.draws.below(5))]
    ops.reduce(slices, room.out(of_out, numel), base=room.maybe(of_out, numel))


def _quantize(room: Room) -> None:
    numel, codes = room.numel(), room.draws.one_of((torch.int8, torch.uint8))
    values, scales = room.any(torch.float32, numel), room.out(torch.float32, ops.num_blocks(numel))
    ops.quantize(values, room.out(codes, numel), scales)


def _dequantize(room: Room) -> None:
    numel, codes = room.numel(), room.draws.one_of((torch.int8, torch.uint8))
    scales = room.any(torch.float32, ops.num_blocks(numel))
    ops.dequantize(room.any(codes, numel), scales, room.out(torch.float32, numel))


def _requantize(room: Room) -> None:
    numel, codes = room.numel(), room.draws.one_of((torch.int8, torch.uint8))
    blocks = ops.num_blocks(numel)
    values, stored = room.any(torch.float32, numel), room.any(torch.float32, blocks)
    ops.requantize(values, stored, room.out(codes, numel), room.out(torch.float32, blocks))


def _encode_slices(room: Room) -> None:
    draws, bits = room.draws, room.draws.one_of((8, 4, 3))
    num_slices, numel = draws.below(4), room.numel()
    encoded = room.out(torch.uint8, num_slices * (ops.encoded_bytes(numel, bits) if bits != 3 else 16))
    values = room.any(room.real(), num_slices * numel)
    residual = room.maybe(torch.bfloat16, num_slices * numel, is_written=True)
    ops.encode_slices(
        values,
        encoded,
        num_slices=num_slices,
        bits=bits,
        seed=draws.below(2**64),
        step=draws.below(2**33),
        key=draws.below(2**33),
        residual=residual,
    )


def _sum_encoded(room: Room) -> None:
    bits, numel, dtype = room.draws.one_of((8, 4, 3)), room.numel(), room.real()
    num_bytes = ops.encoded_bytes(numel, bits) if bits != 3 else 16
    slices = [room.any(torch.uint8, num_bytes) for _ in range(room.draws.below(4))]
    ops.sum_encoded(slices, room.out(dtype, numel), bits=bits, base=room.maybe(dtype, numel))


STORAGES = (
    ops.Storage(),
    ops.Storage(torch.bfloat16, "float32", torch.bfloat16, torch.bfloat16),
    ops.Storage(torch.bfloat16, "remainder", torch.float32, torch.int8),
    ops.Storage(torch.bfloat16, "none", torch.float16, torch.int8),
    ops.Storage(torch.float16, "float32", torch.float32, torch.float32),
)


def _segment(room: Room, storage: ops.Storage, kernel: ops.StepKernel) -> ops.SegmentArrays:
    numel, draws = room.numel(), room.draws
    master = None if storage.master_dtype is None else room.maybe(storage.master_dtype, numel, is_written=True)
    states, scales = [], []
    for signed in kernel.signed[: 3 - draws.below(2)]:
        states.append(room.maybe(storage.dtype_of_state(signed=signed), numel, is_written=True))
        if storage.has_scales:
            scales.append(room.maybe(torch.float32, ops.num_blocks(numel), is_written=True))
    return ops.SegmentArrays(
        room.out(storage.param_dtype, numel),
        room.maybe(storage.grad_dtype, numel),
        master,
        states,
        scales,
        group=draws.below(3),
        key=draws.below(2**33),
        first=draws.below(2**61),
    )


def _step(room: Room) -> None:
    draws = room.draws
    kernel, storage = draws.one_of(list(ops.OPTIMIZERS.values())), draws.one_of(STORAGES)
    segments = [_segment(room, storage, kernel) for _ in range(draws.below(3))]
    table = ops.SegmentTable(storage, segments, kernel.signed)
    if draws.below(2):
        table.set_grads([room.maybe(storage.grad_dtype, segment.param.numel()) for segment in segments])
    active = torch.tensor([draws.below(2) for _ in segments], dtype=torch.uint8)
    groups = torch.tensor([[draws.below(4) / 4 for _ in kernel.columns] for _ in range(draws.below(4))])
    kernel(
        table,
        active=active,
        steps=torch.zeros(2, len(segments)),
        groups=groups.double().reshape(-1, len(kernel.columns)),
        control=ops.StepControl(seed=draws.below(2**64)),
    )


CALLS: tuple[Callable[[Room], None], ...] = (
    _pack,
    _pack_segments,
    _copy,
    _reduce,
    _quantize,
    _dequantize,
    _requantize,
    _encode_slices,
    _sum_encoded,
    _step,
)


def call(data: bytes) -> None:
    """One call as the input has it."""
    draws = Draws(data)
    function = draws.one_of(CALLS)
    room = Room(draws)
    before = room.memory.clone()
    may_change = torch.zeros(MEMORY_BYTES, dtype=torch.bool)
    try:
        function(room)
    except ZeroOptError:
        assert torch.equal(room.memory, before), "it has refused the arguments, and written"
    for tensor in room.written:
        begin, itemsize = tensor.storage_offset() * tensor.element_size(), tensor.element_size()
        offsets = torch.arange(may_change.numel() // itemsize).as_strided(tensor.shape, tensor.stride())
        for byte in range(itemsize):
            may_change[begin + offsets.reshape(-1) * itemsize + byte] = True
    changed = room.memory != before
    assert not bool((changed & ~may_change).any()), "it has written where nothing of it is"


def examples() -> list[bytes]:
    """Inputs that call each of the functions several times, mostly with tensors as they should be."""
    rng = random.Random(0)
    return [bytes([number, *rng.choices(range(7), k=120)]) for number in range(len(CALLS)) for _ in range(8)]
