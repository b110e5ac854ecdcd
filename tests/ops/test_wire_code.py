"""Arrays as they travel: codes, what they leave out, and sums of several."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import threads
from torch import Tensor

from zeroopt import ops
from zeroopt.errors import ConfigError

BITS = pytest.mark.parametrize("bits", [8, 4])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOISE = {"seed": 2**63 + 12345, "step": 7, "key": 2**31 + 3}


def most(bits: int) -> int:
    return 127 if bits == 8 else 7


def random_values(numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many sizes, from a thousandth of the largest on."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator) * 10 ** (3 * torch.rand(numel, generator=generator) - 3)
    return values.to(dtype)


def encode(
    values: Tensor, bits: int, num_slices: int = 1, residual: Tensor | None = None, **noise: int
) -> list[Tensor]:
    """The slices, in memory that nothing else may be written to."""
    size = ops.encoded_bytes(values.numel() // num_slices, bits)
    room = torch.full((num_slices * size + 64,), 0x5A, dtype=torch.uint8)
    begin = 16 + -room.data_ptr() % 16
    encoded = room[begin : begin + num_slices * size]
    ops.encode_slices(values, encoded, num_slices=num_slices, bits=bits, residual=residual, **{**NOISE, **noise})
    assert (room[:begin] == 0x5A).all() and (room[begin + num_slices * size :] == 0x5A).all()
    return list(encoded.view(num_slices, size).unbind())


def decode(encoded: Tensor, numel: int, bits: int) -> Tensor:
    out = torch.empty(numel)
    ops.sum_encoded([encoded], out, bits=bits)
    return out


@BITS
@settings(max_examples=60, deadline=None)
@given(
    slice_numel=st.integers(0, 900),
    num_slices=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    has_residual=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    count=st.integers(1, 3),
)
def test_follows_the_reference(
    bits: int, slice_numel: int, num_slices: int, dtype: torch.dtype, has_residual: bool, seed: int, count: int
) -> None:
    values = random_values(slice_numel * num_slices, slice_numel, dtype)
    residual = random_values(values.numel(), 1).mul(0.01).bfloat16() if has_residual else None
    noise = {"seed": seed, "step": slice_numel, "key": num_slices}
    expected, left = reference.wire_encode(values, residual, bits, num_slices, **noise)
    with threads(count):
        encoded = encode(values, bits, num_slices, residual, **noise)
    for one, other in zip(encoded, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(decode(one, slice_numel, bits), reference.wire_decode(other, slice_numel, bits))
    assert left is None or torch.equal(residual, left)


@BITS
@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(0, 900),
    num_slices=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    base=st.sampled_from(["none", "another", "out"]),
    count=st.integers(1, 3),
)
def test_sums_are_those_of_reduce(
    bits: int, numel: int, num_slices: int, dtype: torch.dtype, base: str, count: int
) -> None:
    slices = [encode(random_values(numel, number), bits, step=number)[0] for number in range(num_slices)]
    decoded = [decode(encoded, numel, bits) for encoded in slices]
    out = random_values(numel + 7, 99, dtype)[3 : numel + 3]  # anywhere
    start = {"none": None, "another": random_values(numel, 98, dtype), "out": out}[base]
    expected = reference.reduce(decoded, dtype, None if start is None else start.clone())
    with threads(count):
        ops.sum_encoded(slices, out, bits=bits, base=start)
    assert torch.equal(out, expected)


@BITS
def test_values_come_out_within_a_step_and_on_average_as_themselves(bits: int) -> None:
    values = random_values(512)
    steps = values.view(2, 256).abs().amax(dim=1).div(most(bits)).repeat_interleave(256)
    total = torch.zeros(512, dtype=torch.float64)
    for step in range(4000):
        decoded = decode(encode(values, bits, step=step)[0], 512, bits)
        assert ((decoded - values).abs() <= 1.0001 * steps).all()
        total += decoded
    error = (total / 4000 - values).abs() / steps
    assert error.max() < 5 * 0.5 / math.sqrt(4000)  # five standard deviations of what is one of two neighbours
    nearest = (decode(encode(values, bits)[0], 512, bits) - values).abs()
    assert (nearest > 0.5 * steps).any(), "rounding to nearest would have no such error, but a biased one"


@BITS
def test_what_is_left_out_comes_later(bits: int) -> None:
    """The sum of all that comes out is that of all values, but for what is left: error feedback."""
    residual = torch.zeros(1000, dtype=torch.bfloat16)
    given, got = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    for step in range(200):
        values = random_values(1000, step)
        given += values
        got += decode(encode(values, bits, residual=residual, step=step)[0], 1000, bits)
    step_size = random_values(1000, 0).abs().max() / most(bits)
    assert ((given - got).abs() <= residual.double().abs() + 0.05 * step_size).all()  # and a bfloat16's roundings


@BITS
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_comes_out_so_and_leaves_nothing(bits: int, bad: float) -> None:
    values = random_values(1000)
    values[300] = bad
    residual = random_values(1000, 1).mul(0.01).bfloat16()
    before = residual.clone()
    out = torch.empty(1000)
    others = encode(random_values(1000, 2), bits)[0]
    ops.sum_encoded([others, encode(values, bits, residual=residual)[0]], out, bits=bits)
    assert out[256:512].isnan().all()
    assert out[:256].isfinite().all() and out[512:].isfinite().all()
    assert residual.isfinite().all()
    assert torch.equal(residual[256:512], before[256:512])
    assert not torch.equal(residual[512:], before[512:])


@BITS
def test_a_sum_with_the_residual_that_overflows_is_not_finite(bits: int) -> None:
    values = torch.full((256,), torch.finfo(torch.float32).max)
    residual = torch.full((256,), 3e38).bfloat16()
    assert decode(encode(values, bits, residual=residual)[0], 256, bits).isnan().all()
    assert residual.isfinite().all()


@BITS
def test_tiny_blocks_are_kept(bits: int) -> None:
    for largest, kept in ((2.0**-118, False), (2.0**-118 * (1 - 2**-24), True), (0.0, True), (1e-45, True)):
        values, residual = torch.full((256,), largest), torch.zeros(256, dtype=torch.bfloat16)
        decoded = decode(encode(values, bits, residual=residual)[0], 256, bits)
        assert bool((decoded == 0).all()) is kept
        assert torch.equal(residual, values.bfloat16() if kept else torch.zeros(256).bfloat16())


def test_sizes() -> None:
    for bits, block in ((8, 260), (4, 132)):
        assert ops.encoded_bytes(0, bits) == 0
        for blocks in (1, 2, 7, 1000):
            expected = -(-blocks * block // 16) * 16
            assert ops.encoded_bytes(256 * blocks, bits) == ops.encoded_bytes(256 * blocks - 255, bits) == expected


def test_random_numbers_differ() -> None:
    values = random_values(256)
    base = encode(values, 8)[0]
    for change in ({"seed": 1}, {"step": 8}, {"key": 1}):
        assert not torch.equal(encode(values, 8, **change)[0], base)
    first, second = encode(values.repeat(2), 8, num_slices=2)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"values": torch.zeros(600).double()},
            "expected values to be float32, bfloat16 or float16, got torch.float64",
        ),
        ({"values": torch.zeros(601)}, "expected values to be 2 equally long slices, got 601 elements"),
        ({"values": torch.zeros(1200)[::2]}, "expected values to be 1-D and contiguous"),
        ({"encoded": torch.zeros(1055, dtype=torch.uint8)}, "expected encoded to be 1-D and contiguous with 1056 elem"),
        ({"encoded": torch.zeros(1056, dtype=torch.int8)}, "expected encoded to be uint8, got torch.int8"),
        ({"encoded": torch.zeros(1064, dtype=torch.uint8)[8:]}, "expected encoded to begin at a multiple of 16 bytes"),
        ({"residual": torch.zeros(600)}, "expected residual to be bfloat16, got torch.float32"),
        ({"residual": torch.zeros(599).bfloat16()}, "expected residual to be 1-D and contiguous with 600 elements"),
        ({"bits": 2}, "expected codes of 4 or 8 bits, got 2"),
        ({"num_slices": 0}, "expected num_slices to be positive, got 0"),
        ({"step": 2**32}, "expected seed, step and key below"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "values": torch.zeros(600),
        "encoded": torch.zeros(2 * ops.encoded_bytes(300, 8), dtype=torch.uint8),
        "num_slices": 2,
        "bits": 8,
        **NOISE,
    }
    with pytest.raises(ConfigError, match=message):
        ops.encode_slices(**{**arguments, **changes})  # type: ignore[arg-type]


def test_refusals_of_sums() -> None:
    encoded, out = torch.zeros(ops.encoded_bytes(300, 8), dtype=torch.uint8), torch.zeros(300)
    for slices, target, base, message in (
        ([], out, None, "at least one tensor"),
        ([encoded[:-16]], out, None, r"expected slices\[0\] to be 1-D and contiguous with 528 elements"),
        ([encoded], out.double(), None, "expected out to be float32"),
        ([encoded], out, out.bfloat16(), "expected base to be torch.float32 as out"),
        ([encoded], encoded[:512].view(torch.float32), None, "overlap|528|144"),
    ):
        with pytest.raises(ConfigError, match=message):
            ops.sum_encoded(slices, target, bits=8, base=base)
