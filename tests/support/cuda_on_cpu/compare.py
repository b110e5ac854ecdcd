"""Compares the kernels of a device with those of the CPU, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from cuda_on_cpu.devices import Array, Device
from op_cases import KERNELS, rows

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)  # dtype codes; BYTES and BITS are for what is no number
BYTES, BITS = 4, 5
NUMPY = [np.float32, np.float64, np.uint16, np.uint16, np.uint8, np.uint16]
PARAM_KINDS = [FLOAT32, BFLOAT16, FLOAT16, BFLOAT16, BFLOAT16]  # by ParamFormat
MASTER_KINDS = [None, FLOAT32, FLOAT32, BITS, None]
STATE_KINDS = [FLOAT32, BFLOAT16, BYTES]  # by StateFormat
QUANT_BLOCK = 256
REDUCE_PAIRS = [(0, 0), (1, 1), (2, 2), (3, 3), (2, 0), (3, 0), (0, 2), (0, 3)]
SPECIAL = [np.nan, np.inf, -np.inf, 1e-40, -0.0, 3e38, -1e-30, 65519.0]

ALL_FORMATS = list(product(range(5), (FLOAT32, BFLOAT16, FLOAT16), range(3)))  # of parameters, gradients, states
PAIRED_FORMATS = [
    (param, (FLOAT32, BFLOAT16, FLOAT16)[(param + state) % 3], state) for param in range(5) for state in range(3)
]
STEPS = [(op, formats) for op in KERNELS for formats in (ALL_FORMATS if op == "adamw" else PAIRED_FORMATS)]
SCALARS = [(8.0, 0.3, 0.0), (None, 0.3, None), (3.0, None, None), (8.0, 0.3, 1.0), (0.0, 1.0, None)]
LAYOUTS = ["aligned", "shifted", "scattered"]
EVERY_NUMEL = tuple(range(1, 601))
MIXED_NUMELS = (1, 7, 8, 9, 31, 255, 256, 257, 300, 511, 1000, 2049)


@dataclass(frozen=True)
class Segments:
    """How long segments are, and where their arrays begin.

    layout: "aligned" at 16-byte boundaries, "shifted" all arrays of a segment equally many elements after one,
    "scattered" each array anywhere.
    """

    numels: tuple[int, ...] = MIXED_NUMELS
    layout: str = "aligned"
    special: bool = False  # NaN, infinities and the like among parameters and gradients
    seed: int = 0

    def is_active(self, index: int) -> bool:
        return index % 5 != 3


@dataclass(frozen=True)
class Step:
    """One call of an optimizer's kernel, `op`. Formats are codes of csrc/kernels.h; scalars are null where None."""

    op: str
    param: int
    grad: int
    state: int
    segments: Segments = Segments()
    grad_scale: float | None = None
    clip_coef: float | None = None
    found_inf: float | None = None


def canonical(values: Array, kind: int) -> Array:
    """The bits, of which all NaN are one: what a NaN's payload is, no one promises."""
    bits = values.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[values.itemsize]).copy()
    infinity = {FLOAT32: 0x7F800000, FLOAT64: 0x7FF << 52, BFLOAT16: 0x7F80, FLOAT16: 0x7C00}.get(kind)
    if infinity is not None:
        magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
        bits[magnitude > infinity] = infinity + 1
    return bits


def encode(values: Array, kind: int) -> Array:
    """float64 values as elements of a dtype."""
    with np.errstate(over="ignore"):
        if kind == BFLOAT16:
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        if kind == FLOAT16:
            return values.astype(np.float16).view(np.uint16)
        return values.astype(NUMPY[kind])


class Arrays:
    """The arrays of one role, of all segments in one stretch of memory; nobody may touch the bytes between them."""

    def __init__(self, kind: int, numels: list[int], shifts: list[int], special: bool, rng: np.random.Generator):
        self.kind = kind
        self.offsets: list[int] = []
        end = 0
        for numel, shift in zip(numels, shifts, strict=True):
            self.offsets.append(
                (end + 31) // 16 * 16 + shift
            )  # whole vectors of whatever type, and at least one between
            end = self.offsets[-1] + numel
        self.memory = np.full((end + 32) * np.dtype(NUMPY[kind]).itemsize, 0x5A, np.uint8).view(NUMPY[kind])
        for numel, offset in zip(numels, self.offsets, strict=True):
            self.memory[offset : offset + numel] = self._values(numel, special, rng)

    def _values(self, numel: int, special: bool, rng: np.random.Generator) -> Array:
        if self.kind in (BYTES, BITS):
            return rng.integers(0, np.iinfo(NUMPY[self.kind]).max, numel, endpoint=True).astype(NUMPY[self.kind])
        values = rng.standard_normal(numel) * 10.0 ** rng.integers(-4, 2, numel)
        if special:
            where = rng.random(numel) < 0.03
            values[where] = rng.choice(SPECIAL, int(where.sum()))
        return encode(values, self.kind)

    def make_positive(self) -> None:
        if self.kind not in (BYTES, BITS):
            sign = self.memory.itemsize * 8 - 1
            self.memory.view(f"u{self.memory.itemsize}")[...] &= (1 << sign) - 1

    def address(self, base: int, segment: int) -> int:
        return base + self.offsets[segment] * self.memory.itemsize


def shifts_of(segments: Segments, role: int) -> list[int]:
    rng = np.random.default_rng([segments.seed, role if segments.layout == "scattered" else 99])
    high = 1 if segments.layout == "aligned" else 8
    return rng.integers(0, high, len(segments.numels)).tolist()


class StepMemory:
    """What a step reads and writes, the same for every device."""

    def __init__(self, step: Step) -> None:
        segments = step.segments
        self.op = KERNELS[step.op]
        self.hypers = self.op.hypers(1e-8, 0.0)
        self.rng = np.random.default_rng(segments.seed)
        self.count = len(segments.numels)
        blocks = [-(-numel // QUANT_BLOCK) for numel in segments.numels]
        state_kind = STATE_KINDS[step.state]
        kinds: list[tuple[str, int | None, bool]] = [
            ("param", PARAM_KINDS[step.param], segments.special),
            ("master", MASTER_KINDS[step.param], segments.special),
            ("grad", step.grad, segments.special),
            *((f"state{k}", state_kind, False) for k in range(3)),
        ]
        self.arrays: dict[str, Arrays] = {}
        for role, (name, kind, special) in enumerate(kinds):
            if kind is not None:
                shifts = shifts_of(segments, role)
                self.arrays[name] = Arrays(kind, list(segments.numels), shifts, special, self.rng)
        for k in range(3 if state_kind == BYTES else 0):
            self.arrays[f"scales{k}"] = Arrays(FLOAT32, blocks, [0] * self.count, False, self.rng)
            self.arrays[f"scales{k}"].make_positive()
            self.arrays[f"scales{k}"].memory[1::3] *= -1  # of blocks in which some codes stand for infinity and NaN
        for k in range(3):
            if k >= len(self.op.signed) or not self.op.signed[k]:
                self.arrays[f"state{k}"].make_positive()
        steps = self.rng.integers(0, 5, self.count) + self.rng.choice([0, 0, 2**24 - 2, 2**31], self.count)
        if step.op == "lamb_update":
            steps += 1
        rounded = steps.astype(np.float32)
        self.steps = np.stack([rounded, (steps - rounded.astype(np.int64)).astype(np.float32)])
        self.squares = self.rng.random((self.count, 2)) * self.rng.integers(0, 3, (self.count, 2))
        self.firsts = self.rng.choice([0, 8, 16, 3, 13, 2**40 + 8, 2**40 + 5], self.count)
        self.keys = self.rng.integers(0, 2**31, self.count)

    def rows(self, step: Step, bases: dict[str, int]) -> Array:
        def address(name: str, index: int) -> int:
            return self.arrays[name].address(bases[name], index) if name in bases else 0

        result = []
        for i, numel in enumerate(step.segments.numels):
            group = i % len(self.hypers)
            names = self.op.states_of(self.hypers[group])
            used = [k < len(self.op.states) and self.op.states[k] in names for k in range(3)]
            states = [address(f"state{k}", i) if used[k] else 0 for k in range(3)]
            scales = [address(f"scales{k}", i) if used[k] else 0 for k in range(3)]
            grad = 0 if step.op == "lamb_update" else address("grad", i)
            head = [numel, group, int(self.keys[i]), int(self.firsts[i])]
            result.append([*head, address("param", i), address("master", i), grad, *states, *scales])
        return np.array(result, np.int64)


def run_step(device: Device, step: Step) -> dict[str, Array]:
    """The bits of all arrays after a step."""
    return prepare_step(device, step).run()


@dataclass
class PreparedStep:
    """A step whose memory lies on a device."""

    device: Device
    step: Step
    memory: StepMemory
    bases: dict[str, int]
    addresses: dict[str, int]

    def launch(self) -> None:
        at = self.addresses
        formats = (self.step.param, self.step.grad, self.step.state)
        tables = (at["rows"], at["active"], at["steps"], at["squares"], self.memory.count)
        scalars = (at["groups"], at["grad_scale"], at["clip_coef"], at["found_inf"], 0x123456789ABCDEF)
        total_numel = sum(self.step.segments.numels)
        self.device.run_over_segments(
            "step", self.step.op, *tables, *formats, *scalars, count=self.memory.count, total_numel=total_numel
        )

    def read(self) -> dict[str, Array]:
        arrays = self.memory.arrays
        result = {name: canonical(self.device.get(base), arrays[name].kind) for name, base in self.bases.items()}
        result["steps"] = self.device.get(self.addresses["steps"])
        if self.addresses["squares"]:
            result["squares"] = self.device.get(self.addresses["squares"])
        return result

    def run(self) -> dict[str, Array]:
        self.launch()
        return self.read()


def prepare_step(device: Device, step: Step) -> PreparedStep:
    memory = StepMemory(step)
    bases = {name: device.put(arrays.memory) for name, arrays in memory.arrays.items()}
    active = np.array([step.segments.is_active(i) for i in range(memory.count)], np.uint8)

    def scalar(value: float | None) -> int:
        return 0 if value is None else device.put(np.array([value], np.float32))

    addresses = {
        "rows": device.put(memory.rows(step, bases)),
        "active": device.put(active),
        "steps": device.put(memory.steps),
        "squares": device.put(memory.squares) if step.op.startswith("lamb") else 0,
        "groups": device.put(np.array(rows(memory.hypers), np.float64)),
        "grad_scale": scalar(step.grad_scale),
        "clip_coef": scalar(step.clip_coef),
        "found_inf": scalar(step.found_inf),
    }
    return PreparedStep(device, step, memory, bases, addresses)


def assert_same(result: dict[str, Array], expected: dict[str, Array], context: Any) -> None:
    assert result.keys() == expected.keys()
    for name, values in expected.items():
        message = f"{name} of {context}"
        if name == "squares":  # sums are taken in another order
            np.testing.assert_allclose(result[name], values, rtol=1e-12, err_msg=message)
        else:
            np.testing.assert_array_equal(result[name], values, message)


def compare_step(device: Device, cpu: Device, step: Step) -> None:
    expected = run_step(cpu, step)
    untouched = prepare_step(cpu, step).read()
    changed = [name for name in expected if not np.array_equal(expected[name], untouched[name], equal_nan=True)]
    assert bool(changed) == (not step.found_inf), f"the CPU kernel changed {changed}"
    assert_same(run_step(device, step), expected, step)


def compare_norms(device: Device, cpu: Device, grad: int, segments: Segments) -> None:
    step = Step("lamb_moments", 0, grad, 0, segments, found_inf=0.0)
    results = []
    for which in (device, cpu):
        prepared = prepare_step(which, step)
        at, count = prepared.addresses, prepared.memory.count
        args = (at["rows"], at["active"], at["squares"], count, grad, at["found_inf"])
        which.run_over_segments("squared_norms", *args, count=count, total_numel=sum(segments.numels))
        found_inf = which.get(at["found_inf"])
        results.append({**prepared.read(), "found_inf": found_inf})
    assert results[1]["found_inf"][0] == (1.0 if segments.special else 0.0)
    assert_same(*results, f"squared_norms of dtype {grad}, {segments}")


def guarded(values: Array, shift: int) -> tuple[Array, int]:
    """A larger array with the values in it, and at which byte."""
    memory = np.full((len(values) + 48) * values.itemsize, 0x5A, np.uint8).view(values.dtype)
    memory[16 + shift : 16 + shift + len(values)] = values
    return memory, (16 + shift) * values.itemsize


def compare_quantize(device: Device, cpu: Device, numel: int, shifts: tuple[int, int], is_signed: bool) -> None:
    """quantize, and dequantize of what it gave. shifts: of the values and of the codes."""
    rng = np.random.default_rng(numel)
    values = rng.standard_normal(numel) * 10.0 ** rng.integers(-30, 2, numel)
    if numel > 2000:
        values[1000], values[300:320], values[1600:1602], values[1700] = np.nan, 0.0, [np.inf, -np.inf], np.nan
        values[2048:2304] = np.nan
    values = encode(values if is_signed else np.abs(values), FLOAT32)
    values_memory, values_start = guarded(values, shifts[0])
    codes_memory, codes_start = guarded(np.zeros(numel, np.uint8), shifts[1])
    scales = np.full(-(-numel // QUANT_BLOCK) + 1, 7.0, np.float32)
    results = []
    for which in (device, cpu):
        source, codes, scale, back = (which.put(a) for a in (values_memory, codes_memory, scales, values_memory))
        which.run("quantize", source + values_start, codes + codes_start, scale, numel, is_signed)
        which.run("dequantize", codes + codes_start, scale, back + values_start, numel, is_signed)
        kinds = {"codes": (codes, BYTES), "scales": (scale, FLOAT32), "values": (back, FLOAT32)}
        results.append({name: canonical(which.get(at), kind) for name, (at, kind) in kinds.items()})
    assert_same(*results, f"quantize of {numel} at {shifts}")


def random_elements(kind: int, numel: int, shift: int, rng: np.random.Generator) -> tuple[Array, int]:
    return guarded(encode(rng.standard_normal(numel) * 10.0 ** rng.integers(-9, 6, numel), kind), shift)


def compare_pack(device: Device, cpu: Device, src: int, dst: int, numel: int, shifts: tuple[int, int]) -> None:
    rng = np.random.default_rng(numel)
    source, source_start = random_elements(src, numel, shifts[0], rng)
    target, target_start = random_elements(dst, numel, shifts[1], rng)
    results = []
    for which in (device, cpu):
        from_address, to_address = which.put(source), which.put(target)
        which.run("pack", from_address + source_start, src, to_address + target_start, dst, numel, 0.3)
        results.append({"dst": canonical(which.get(to_address), dst)})
    assert_same(*results, f"pack from {src} to {dst} of {numel} at {shifts}")


def compare_pack_segments(device: Device, cpu: Device, src: int, dst: int, segments: Segments) -> None:
    """Each segment from an array of its own to an array of its own."""
    rng = np.random.default_rng(segments.seed)
    places = {"aligned": (0, 0), "shifted": (3, 3), "scattered": (1, 6)}[segments.layout]
    sources = [random_elements(src, numel, places[0], rng) for numel in segments.numels]
    targets = [random_elements(dst, numel, places[1], rng) for numel in segments.numels]
    count = len(sources)
    results = []
    for which in (device, cpu):
        rows = np.zeros((count, 13), np.int64)
        target_addresses = [which.put(memory) for memory, _ in targets]
        for i, (source, start) in enumerate(sources):
            rows[i, 0] = segments.numels[i]
            rows[i, 4] = target_addresses[i] + targets[i][1]
            rows[i, 6] = which.put(source) + start
        active = np.array([segments.is_active(i) for i in range(count)], np.uint8)
        which.run("pack_segments", rows.ctypes.data, active.ctypes.data, count, src, dst, 0.3)
        results.append({f"dst {i}": canonical(which.get(at), dst) for i, at in enumerate(target_addresses)})
    assert_same(*results, f"pack_segments from {src} to {dst}, {segments}")


def compare_reduce(device: Device, cpu: Device, pair: tuple[int, int], num_slices: int, numel: int, shift: int) -> None:
    """With a base; the last slice begins `shift` elements later than the others."""
    src, dst = pair
    rng = np.random.default_rng(numel)
    slices = [random_elements(src, numel, shift if i == num_slices - 1 else 0, rng) for i in range(num_slices)]
    base, base_start = random_elements(dst, numel, 0, rng)
    results = []
    for which in (device, cpu):
        addresses = [which.put(memory) + start for memory, start in slices]
        base_address, out = which.put(base), which.put(base)
        which.run_over_slices("reduce", addresses, src, base_address + base_start, out + base_start, dst, numel)
        results.append({"out": canonical(which.get(out), dst)})
    assert_same(*results, f"reduce of {num_slices} slices of {pair}, {numel} elements")


def compare_wire_code(
    device: Device, cpu: Device, dtype: int, bits: int, numel: int, num_slices: int, shift: int
) -> None:
    """encode_slices of values that begin `shift` elements later, with a residual and without, and sum_encoded of the slices."""
    rng = np.random.default_rng(numel + num_slices)
    values = encode(rng.standard_normal(numel * num_slices) * 10.0 ** rng.integers(-3, 1, numel * num_slices), dtype)
    if numel > 500:
        values[400] = encode(np.array([np.inf]), dtype)[0]
        values[:256] = 0
    memory, start = guarded(values, shift)
    left, left_start = random_elements(BFLOAT16, values.size, shift, rng)
    base, base_start = random_elements(dtype, numel, shift, rng)
    blocks = -(-numel // QUANT_BLOCK)
    size = -(-blocks * (QUANT_BLOCK * bits // 8 + 4) // 16) * 16
    results = []
    for which in (device, cpu):
        source, residual, start_from, out = (which.put(a) for a in (memory, left, base, base))
        result = {}
        for name, address in (("with", residual + left_start), ("without", 0)):
            encoded = which.put(np.full(size * num_slices + 16, 0x5A, np.uint8))
            arguments = (source + start, dtype, address, encoded, numel, num_slices, bits, 2**63 + 5, 3, 2**31 + 1)
            which.run("encode_slices", *arguments)
            slices = [encoded + size * number for number in range(num_slices)]
            sums = (bits, start_from + base_start, out + base_start, dtype, numel)
            which.run_over_slices("sum_encoded", slices, *sums)
            result[f"codes {name}"] = which.get(encoded)
            result[f"sum {name}"] = canonical(which.get(out), dtype)
        result["residual"] = which.get(residual)
        results.append(result)
    assert_same(*results, f"{bits}-bit codes of {num_slices} slices of {numel} of dtype {dtype}")
