"""Segments to run the steps of optimizers on, and what a step must make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import reference
import torch
from op_cases import Op
from reference import Arrays
from torch import Tensor

from zeroopt import ops

Noise = Callable[[int], Tensor]  # of an array: 0 for the parameter, 1 + k for state k
GUARD_BYTES = 64
GUARD = 0xA5
HALVES = (torch.bfloat16, torch.float16)
PARAMS = (
    (torch.float32, "float32"),
    (torch.bfloat16, "float32"),
    (torch.float16, "float32"),
    (torch.bfloat16, "remainder"),
    (torch.bfloat16, "none"),
)
STORAGES = [
    ops.Storage(param, master, grad, state)
    for (param, master), grad, state in product(
        PARAMS, (torch.float32, *HALVES), (torch.float32, torch.bfloat16, torch.int8)
    )
]
FLOAT32 = ops.Storage()
# One for every format of a parameter, a gradient and a state.
FEW_STORAGES = [
    FLOAT32,
    ops.Storage(torch.bfloat16, "remainder", torch.bfloat16, torch.int8),
    ops.Storage(torch.bfloat16, "none", torch.float16, torch.bfloat16),
    ops.Storage(torch.float16, "float32", torch.float16, torch.float32),
    ops.Storage(torch.bfloat16, "float32", torch.float32, torch.int8),
]


def storage_name(storage: ops.Storage) -> str:
    names = [
        str(dtype).removeprefix("torch.") for dtype in (storage.param_dtype, storage.grad_dtype, storage.state_dtype)
    ]
    return f"{names[0]}+{storage.master_weights}-grad:{names[1]}-state:{names[2]}"


def expect(op: Op, arrays: Arrays, step: float, hyper: dict[str, float]) -> Arrays:
    """What the reference makes of arrays."""
    expected: Arrays = getattr(reference, op.name)(arrays, step, **hyper)
    return expected


def random_values(op: Op, numel: int, seed: int) -> Arrays:
    """Of about 1, every seventh gradient 0."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(numel, generator=generator) for name in ("param", "grad", *op.states)}
    for name, signed in zip(op.states, op.signed, strict=True):
        if not signed:
            values[name] = values[name].abs()
    if (
        "grad_avg" in values
    ):  # the mean of squares is no less than the square of the mean, and their difference no rounding
        values["square_avg"] += values["grad_avg"] ** 2 + 0.5
    values["grad"][::7] = 0
    return values


class Stored:
    """One segment as kernels get it, in arrays that each lie between guard bytes.

    Args:
        values: float32 arrays by name; random ones if none are given. They are rounded to what the storage can hold.
        shifts: by how many elements each array begins later than at a multiple of 64 bytes.
        key, first, group: as in `ops.SegmentArrays`.
    """

    def __init__(
        self,
        op: Op,
        storage: ops.Storage = FLOAT32,
        numel: int = 100,
        *,
        hyper: dict[str, float] | None = None,
        values: Arrays | None = None,
        shifts: dict[str, int] | None = None,
        seed: int = 0,
        key: int = 0,
        first: int = 0,
        group: int = 0,
    ) -> None:
        self.op, self.storage, self.hyper = op, storage, hyper or op.hyper()
        self.key, self.first, self.group = key, first, group
        self._rooms: list[Tensor] = []
        self.states = op.states_of(self.hyper)
        stored = store(op, storage, values or random_values(op, numel, seed), self.states)
        self.raw = {name: self._place(array, (shifts or {}).get(name, 0)) for name, array in stored.items()}
        self.numel = self.raw["param"].numel()

    def _place(self, array: Tensor, shift: int) -> Tensor:
        begin = GUARD_BYTES + shift * array.element_size()
        self._rooms.append(torch.full((begin + array.nbytes + GUARD_BYTES,), GUARD, dtype=torch.uint8))
        placed = self._rooms[-1][begin : begin + array.nbytes].view(array.dtype)
        return placed.copy_(array)

    @property
    def arrays(self) -> ops.SegmentArrays:
        scales = [self.raw.get(f"{name}_scale") for name in self.op.states] if self.storage.has_scales else []
        return ops.SegmentArrays(
            self.raw["param"],
            self.raw["grad"],
            self.raw.get("master"),
            [self.raw.get(name) for name in self.op.states],
            scales,
            self.group,
            self.key,
            self.first,
        )

    def everything(self) -> bytes:
        """Of all arrays and the guards around them."""
        return b"".join(room.numpy().tobytes() for room in self._rooms)

    def guards_are_intact(self) -> bool:
        for room, array in zip(self._rooms, self.raw.values(), strict=True):
            begin = array.data_ptr() - room.data_ptr()
            if not (room[:begin] == GUARD).all() or not (room[begin + array.nbytes :] == GUARD).all():
                return False
        return True

    def copies(self) -> dict[str, bytes]:
        """The bytes of every array."""
        return {name: array.view(torch.uint8).numpy().tobytes() for name, array in self.raw.items()}

    def values(self) -> Arrays:
        """What the arrays say, in float64."""
        values = {"grad": self.raw["grad"].double()}
        for name in self.states:
            values[name] = self.raw[name].double()
            if self.storage.has_scales:
                values[name] = reference.dequantize(self.raw[name], self.raw[f"{name}_scale"])
        if self.storage.master_weights == "remainder":
            return {**values, "param": reference.join(self.raw["param"], self.raw["master"]).double()}
        return {**values, "param": self.raw.get("master", self.raw["param"]).double()}


def store(op: Op, storage: ops.Storage, values: Arrays, states: Sequence[str]) -> Arrays:
    """Float32 values as the arrays of a segment, by name; the scales of a state are `<state>_scale`."""
    param = values["param"]
    stored = {"param": param, "grad": values["grad"].to(storage.grad_dtype)}
    if storage.param_dtype is torch.float16:
        stored |= {"param": param.half(), "master": param}
    elif storage.master_weights == "remainder":
        stored["param"], stored["master"] = reference.split(param)
    elif storage.param_dtype is torch.bfloat16:
        stored["param"] = reference.round_ties_away(param)
        if storage.master_weights == "float32":
            stored["master"] = param
    for name, signed in zip(op.states, op.signed, strict=True):
        if name not in states:
            continue
        if storage.has_scales:
            stored[name], stored[f"{name}_scale"] = reference.quantize(values[name], signed=signed)
        else:
            stored[name] = values[name].to(storage.state_dtype)
    return stored


def table_of(segments: Sequence[Stored]) -> ops.SegmentTable:
    storage = segments[0].storage if segments else FLOAT32
    signed = segments[0].op.signed if segments else (True,)
    return ops.SegmentTable(storage, [segment.arrays for segment in segments], signed)


def groups_of(segments: Sequence[Stored]) -> Tensor:
    hypers = {segment.group: segment.hyper for segment in segments}
    return torch.tensor([list(hypers[group].values()) for group in sorted(hypers)], dtype=torch.float64)


def run(
    segments: Sequence[Stored],
    *,
    steps: Tensor | None = None,
    active: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """One step of all segments in one call. Returns the steps taken so far, which `steps` begins with: one number for each."""
    steps = torch.full((len(segments),), 2.0) if steps is None else steps
    counts = torch.stack([steps.float(), (steps.double() - steps.float()).float()])
    active = torch.ones(len(segments), dtype=torch.uint8) if active is None else active
    table = table_of(segments)
    ops.OPTIMIZERS[segments[0].op.name](table, active=active, steps=counts, groups=groups_of(segments), **arguments)
    return steps.copy_(counts.double().sum(0))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# A step has some ten roundings to float32, each wrong by 6e-8 of what is rounded at most, and values are of about 1.
TOLERANCE = 1e-6


def check_step(segment: Stored, before: Arrays, step: float, *, factor: float = 1.0, seed: int = 0) -> None:
    """Check a segment after a step against the reference on the values before it, and the storage of both.

    Storage is exact: it is checked to be what the reference stores for some value within the tolerance around the exact
    one. All roundings keep the order of values, so these are the values between what it stores for the two ends.

    Args:
        before: `segment.values()` before the step.
        factor: what gradients were multiplied by.
        seed: of stochastic rounding.
    """
    op, hyper, after = segment.op, segment.hyper, segment.values()
    noise = partial(_noise, segment, seed, int(step))
    old = {**before, "grad": before["grad"] * factor}
    if op.name == "lamb":  # the second pass uses the states as the first one left them in memory
        expected, squares = reference.lamb_moments(old, step, **hyper)
        expected["param"] = reference.lamb_update({**old, **after, "param": old["param"]}, step, squares, **hyper)
    else:
        expected = expect(op, old, step, hyper)
    for name in segment.states:
        number = op.states.index(name)
        signed = op.signed[number]
        # What cannot be negative is a sum of squares, without cancellation.
        tolerance = TOLERANCE * (old[name].abs() + old["grad"].abs() + 0.1 if signed else expected[name] + 1e-6)
        low, high = expected[name] - tolerance, expected[name] + tolerance
        _check_state(segment, number, low, high, noise)
    tolerance = TOLERANCE * (1 + old["param"].abs() + (expected["param"] - old["param"]).abs())
    if op.name == "lion":  # where the two terms cancel, the sign is of the rounding
        terms = hyper["beta1"] * old["exp_avg"], (1 - hyper["beta1"]) * old["grad"]
        cancelled = (terms[0] - terms[1]).abs().minimum((terms[0] + terms[1]).abs()) < TOLERANCE
        tolerance = torch.where(cancelled, 2 * hyper["lr"], tolerance)
    _check_param(segment, after["param"], expected["param"] - tolerance, expected["param"] + tolerance, noise)


def _noise(segment: Stored, seed: int, step: int, array: int) -> Tensor:
    return reference.noise(seed, step, segment.key, array, segment.first, segment.numel)


def _check_param(segment: Stored, after: Tensor, low: Tensor, high: Tensor, noise: Noise) -> None:
    storage, param = segment.storage, segment.raw["param"]
    if storage.master_weights == "none":
        _check_stochastic(param, low, high, noise(0))
        return
    assert_between(low, after, high)
    if storage.param_dtype is torch.float16:
        assert torch.equal(param, segment.raw["master"].half())
    elif storage.master_weights == "remainder":
        rounded, remainder = reference.split(after.float())
        assert torch.equal(param, rounded) and torch.equal(segment.raw["master"], remainder)
    elif storage.param_dtype is torch.bfloat16:
        assert torch.equal(param, reference.round_ties_away(segment.raw["master"]))


def _check_state(segment: Stored, number: int, low: Tensor, high: Tensor, noise: Noise) -> None:
    name, dtype = segment.op.states[number], segment.storage.state_dtype
    array = segment.raw[name]
    if dtype is torch.float32:
        assert_between(low, array, high)
    elif dtype is torch.bfloat16:
        _check_stochastic(array, low, high, noise(1 + number))
    else:
        dither = None if array.dtype is torch.int8 else reference.dither(noise(1 + number))
        check_codes(array, segment.raw[f"{name}_scale"], low, high, dither)


def _check_stochastic(rounded: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> None:
    least, most = (reference.round_stochastic(end.float(), noise) for end in (low, high))
    assert_between(least, rounded, most)


def check_codes(codes: Tensor, scales: Tensor, low: Tensor, high: Tensor, dither: Tensor | None = None) -> None:
    """Codes and scales of values known to lie between two ends: rounded to the nearest, but for 0.001 of a code, after
    `dither` was added."""
    signed = codes.dtype is torch.int8
    low, high = (low, high) if signed else (low.clamp(min=0), high)
    least, most = (
        torch.stack([block.max() for block in torch.split(end, reference.QUANT_BLOCK)])
        for end in _magnitudes(low, high)
    )
    largest = scales.double() if signed else scales.double() ** 2
    assert_between(least * (1 - 1e-6), largest, most * (1 + 1e-6))
    each = scales.repeat_interleave(reference.QUANT_BLOCK)[: codes.numel()]
    used = each > 0
    least, most = (reference.code_position(end[used], each[used], signed=signed) for end in (low, high))
    if dither is not None:
        least, most = least + dither[used], most + dither[used]
    least, most = least - 0.501, most + 0.501
    if not signed:
        least, most = least.clamp(max=255), most.clamp(min=1)
    assert_between(least, codes[used], most)
    assert (codes[~used] == 0).all()


def _magnitudes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest magnitude between two ends."""
    crosses = (low <= 0) & (high >= 0)
    least = torch.where(crosses, 0.0, low.abs().minimum(high.abs()))
    return least, low.abs().maximum(high.abs())


def assert_between(low: Tensor, values: Tensor, high: Tensor) -> None:
    low, values, high = low.double(), values.double(), high.double()
    outside = ~((low <= values) & (values <= high))
    if bool(outside.any()):
        worst = int(outside.nonzero()[0])
        found = f"{values[worst].item()!r}, not in [{low[worst].item()!r}, {high[worst].item()!r}]"
        raise AssertionError(
            f"{int(outside.sum())} of {values.numel()} are outside, the first is element {worst}: {found}"
        )
