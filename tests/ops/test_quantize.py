"""Arrays in 8 bits: the code, its error, and what becomes of blocks that it cannot hold."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from step_cases import check_codes, threads
from torch import Tensor

from zeroopt import ops
from zeroopt.errors import ConfigError
from zeroopt.optim import FusedAdamW

LENGTHS = [*range(1, 71), *(m * 256 + d for m in (1, 2, 4, 16) for d in (-1, 0, 1))]
both = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty(values.numel(), dtype=torch.int8 if signed else torch.uint8)
    scales = torch.empty(ops.num_blocks(values.numel()))
    ops.quantize(values, codes, scales)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    values = torch.empty(codes.numel())
    ops.dequantize(codes, scales, values)
    return values


def moments(numel: int, *, signed: bool, seed: int = 0) -> Tensor:
    """Of many sizes in one block, from a millionth of the largest on."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator) * 10 ** (6 * torch.rand(numel, generator=generator) - 3)
    return values if signed else values.square()


@both
class TestCode:
    def test_follows_the_reference(self, signed: bool) -> None:
        for numel in LENGTHS:
            values = moments(numel, signed=signed, seed=numel)
            codes, scales = quantize(values, signed=signed)
            expected, expected_scales = reference.quantize(values, signed=signed)
            assert torch.equal(scales, expected_scales)
            check_codes(codes, scales, values.double(), values.double())
            assert ((codes.long() - expected.long()) != 0).sum() <= 0.01 * numel  # of those next to a half
            decoded = reference.dequantize(codes, scales)
            torch.testing.assert_close(dequantize(codes, scales).double(), decoded, rtol=1e-6, atol=0)

    def test_error_is_within_half_a_step(self, signed: bool) -> None:
        """Steps of 1/127 of the bent share, whose slope is 2 / (1 + a)^2, or of 1/255 of the square root."""
        values = moments(100_000, signed=signed)
        codes, scales = quantize(values, signed=signed)
        decoded, exact = dequantize(codes, scales).double(), values.double()
        scale = scales.double().repeat_interleave(256)[: values.numel()]
        if signed:
            wide = (exact / scale).abs() + 1 / 127  # where the curve is flattest of the step
            bound = scale * (1 + wide) ** 2 / 2 * 0.501 / 127
            assert ((decoded - exact).abs() <= bound).all()
            assert ((decoded - exact).abs() <= scale * 1.01 / 127).all()
            small = exact.abs() < scale / 1000
            assert ((decoded - exact).abs()[small] <= scale[small] * 1.01 / 2 / 254).all()
        else:
            error = (decoded.sqrt() - exact.sqrt()).abs()
            lifted = codes == 1  # a positive value is never 0
            assert (error <= scale * (0.5 + 0.5 * lifted) * 1.001 / 255).all()

    def test_every_code_comes_back(self, signed: bool) -> None:
        """Of every scale. -128 is never made."""
        codes = torch.arange(-127, 128).to(torch.int8) if signed else torch.arange(256).to(torch.uint8)
        codes = torch.cat([codes, codes[-1:]])[:256]
        for exponent in range(-62, 63):
            for mantissa in (1.0, 1.2345, 1.9999999):
                scales = torch.tensor([mantissa * 2.0**exponent])
                again, scales_again = quantize(dequantize(codes, scales), signed=signed)
                assert torch.equal(again, codes), (exponent, mantissa)
                torch.testing.assert_close(scales_again, scales, rtol=2e-7, atol=0)

    def test_the_largest_has_the_largest_code(self, signed: bool) -> None:
        for seed in range(100):
            values = moments(256, signed=signed, seed=seed)
            codes, scales = quantize(values, signed=signed)
            assert codes[values.abs().argmax()].abs() == (127 if signed else 255)
            torch.testing.assert_close(dequantize(codes, scales).abs().max(), values.abs().max(), rtol=1e-6, atol=0)

    def test_keeps_order_and_signs(self, signed: bool) -> None:
        values = moments(256, signed=signed).sort().values
        codes, _ = quantize(values, signed=signed)
        assert (codes.long().diff() >= 0).all()
        assert (codes.long() * values >= 0).all()

    def test_blocks_are_independent(self, signed: bool) -> None:
        values = moments(2000, signed=signed)
        codes, scales = quantize(values, signed=signed)
        for block, begin in enumerate(range(0, 2000, 256)):
            part = values[begin : begin + 256].clone()
            codes_of, scales_of = quantize(part, signed=signed)
            assert torch.equal(codes_of, codes[begin : begin + 256])
            assert scales_of.item() == scales[block].item()

    def test_no_elements(self, signed: bool) -> None:
        codes, scales = quantize(torch.empty(0), signed=signed)
        assert scales.numel() == 0 and dequantize(codes, scales).numel() == 0

    def test_zero_blocks(self, signed: bool) -> None:
        codes, scales = quantize(torch.tensor([0.0, -0.0] * 150), signed=signed)
        assert (codes == 0).all() and (scales == 0).all()
        assert (dequantize(codes, scales) == 0).all()

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
    def test_what_is_not_finite_comes_back_and_spoils_no_other(self, bad: float, signed: bool) -> None:
        values = moments(700, signed=signed)
        bad = bad if signed else abs(bad)
        values[300] = bad
        codes, scales = quantize(values, signed=signed)
        expected, expected_scales = reference.quantize(values, signed=signed)
        assert torch.equal(scales, expected_scales) and scales.signbit().tolist() == [False, True, False]
        assert ((codes.long() - expected.long()) != 0).sum() <= 7  # of those next to a half
        decoded = dequantize(codes, scales)
        assert str(decoded[300].item()) == str(abs(bad) if math.isnan(bad) else bad)
        others = torch.arange(700) != 300
        worst = (
            1.02 * (values - dequantize(*quantize(torch.where(others, values, 0.0), signed=signed)))[others].abs().max()
        )
        assert ((decoded - values)[others].abs() <= worst).all()
        block = torch.where(others, values, 0.0)[256:512]
        largest = block.abs().argmax()
        assert codes[256 + largest].abs() == (126 if signed else 253)
        torch.testing.assert_close(decoded[256 + largest], block[largest], rtol=1e-6, atol=0)
        again = quantize(decoded, signed=signed)
        assert torch.equal(again[0], codes), "what has been decoded is encoded to the same codes"

    def test_nothing_is_finite(self, signed: bool) -> None:
        values = torch.tensor([math.inf, math.nan, -math.inf if signed else math.inf, 0.0] * 64)
        codes, scales = quantize(values, signed=signed)
        assert scales.item() == 0 and bool(scales.signbit())
        decoded = dequantize(codes, scales)
        torch.testing.assert_close(decoded, values, rtol=0, atol=0, equal_nan=True)

    def test_the_largest_floats_beside_infinity(self, signed: bool) -> None:
        largest = torch.finfo(torch.float32).max
        values = torch.tensor([largest, math.inf, -largest if signed else largest, 0.5 * largest])
        codes, scales = quantize(values, signed=signed)
        decoded = dequantize(codes, scales)
        assert decoded.isfinite().tolist() == [True, False, True, True]
        torch.testing.assert_close(decoded, values, rtol=0.02, atol=0)

    def test_tiny_blocks_are_zero(self, signed: bool) -> None:
        """Below 2**-125 the inverse of a scale would be subnormal, whose precision is less."""
        for largest, kept in ((2.0**-125, True), (2.0**-125 * (1 - 2**-24), False), (1e-45, False)):
            values = torch.full((256,), largest)
            codes, scales = quantize(values, signed=signed)
            assert bool((scales > 0).all()) is kept
            assert bool((codes != 0).all()) is kept
            if kept:
                torch.testing.assert_close(dequantize(codes, scales), values, rtol=1e-6, atol=0)

    def test_largest_floats(self, signed: bool) -> None:
        values = torch.full((256,), torch.finfo(torch.float32).max)
        values[::2] *= -1 if signed else 0.5
        codes, scales = quantize(values, signed=signed)
        check_codes(codes, scales, values.double(), values.double())

    def test_unaligned_and_nothing_else_touched(self, signed: bool) -> None:
        dtype = torch.int8 if signed else torch.uint8
        for shift in range(1, 17):
            values = moments(600 + shift, signed=signed)[shift:]
            codes, scales = torch.full((700,), 7, dtype=dtype), torch.full((20,), 7.0)
            ops.quantize(values, codes[shift : shift + 600], scales[shift % 7 : shift % 7 + 3])
            expected, expected_scales = quantize(values.clone(), signed=signed)
            assert torch.equal(codes[shift : shift + 600], expected)
            assert torch.equal(scales[shift % 7 : shift % 7 + 3], expected_scales)
            assert (codes[:shift] == 7).all() and (codes[shift + 600 :] == 7).all()
            assert (scales[: shift % 7] == 7).all() and (scales[shift % 7 + 3 :] == 7).all()
            room = torch.full((700,), 7.0)
            ops.dequantize(expected, expected_scales, room[shift : shift + 600])
            assert torch.equal(room[shift : shift + 600], dequantize(expected, expected_scales))
            assert (room[:shift] == 7).all() and (room[shift + 600 :] == 7).all()

    def test_thread_counts_give_the_same_bits(self, signed: bool) -> None:
        values = moments(300_007, signed=signed)
        results = []
        for count in (1, 2, 3):
            with threads(count):
                codes, scales = quantize(values, signed=signed)
                results.append((codes, scales, dequantize(codes, scales)))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_positive_values_never_get_code_0() -> None:
    """Their square root is divided by. Of subnormal ones too, where the block as a whole is not tiny."""
    values = torch.cat([torch.tensor([1.0]), 10.0 ** -torch.linspace(0, 45, 255)])
    assert (values[:-5] > 0).all()
    codes, scales = quantize(values, signed=False)
    assert torch.equal(codes == 0, values == 0)
    assert (dequantize(codes, scales)[values > 0] > 0).all()
    small = 2.0**-124 * values
    codes, scales = quantize(small, signed=False)
    assert torch.equal(codes == 0, small == 0)
    assert (dequantize(codes, scales)[small > 0] > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(300).double()}, "expected values to be float32, got torch.float64"),
        ({"codes": torch.zeros(300, dtype=torch.int16)}, "expected codes to be int8 or uint8, got torch.int16"),
        ({"scales": torch.zeros(2).double()}, "expected scales to be float32, got torch.float64"),
        ({"codes": torch.zeros(301, dtype=torch.int8)}, "expected codes to be 1-D and contiguous with 300 elements"),
        ({"scales": torch.zeros(1)}, "expected scales to be 1-D and contiguous with 2 elements"),
        ({"values": torch.zeros(600)[::2]}, "expected values to be 1-D and contiguous"),
        ({"values": torch.zeros(30, 10)}, "expected values to be 1-D and contiguous"),
        ({"scales": torch.zeros(2, device="meta")}, "expected scales to be on cpu, got meta"),
    ],
)
def test_refusals(changes: dict[str, Tensor], message: str) -> None:
    arrays = {"values": torch.zeros(300), "codes": torch.zeros(300, dtype=torch.int8), "scales": torch.zeros(2)}
    arrays |= changes
    for function in (ops.quantize, ops.dequantize):
        with pytest.raises(ConfigError, match=message):
            function(**arrays)


def second_moments_after(decay_steps: int, shrink: float) -> tuple[Tensor, Tensor]:
    """exp_avg_sq of a block, half of which gets smaller gradients from step 500 on: in 8 bits, and in float32."""
    results = []
    for dtype in (torch.int8, torch.float32):
        param = torch.nn.Parameter(torch.zeros(256))
        optimizer = FusedAdamW([param], lr=0.0, state_dtype=dtype)
        for step in range(500 + decay_steps):
            param.grad = torch.ones(256)
            if step >= 500:
                param.grad[:128] *= shrink
            optimizer.step()
        entry = optimizer.state[param]
        results.append(
            dequantize(entry["exp_avg_sq"], entry["exp_avg_sq_scale"]) if dtype is torch.int8 else entry["exp_avg_sq"]
        )
    return results[0], results[1]


@pytest.mark.parametrize("shrink", [0.3, 0.1])
def test_second_moments_decay_beside_larger_ones(shrink: float) -> None:
    """A step of decay is a thousandth: less than half a code, so that rounding to nearest would keep the code for good."""
    coded, exact = second_moments_after(4000, shrink)
    ratio = (coded[:128] / exact[:128]).mean().item()
    assert 0.8 < ratio < 1.25  # with codes rounded to nearest: 3 and more


@both
class TestEncodeAgain:
    """`encode_again` gives the very codes, where `quantize` would choose others."""

    def test_any_codes(self, signed: bool) -> None:
        dtype = torch.int8 if signed else torch.uint8
        low, high = (-127, 128) if signed else (0, 256)
        for seed, numel in enumerate([*LENGTHS, 5000]):
            generator = torch.Generator().manual_seed(seed)
            codes = torch.randint(low, high, (numel,), generator=generator).to(dtype)
            codes //= 1 + seed % 5  # the largest may be far from the largest there is
            scales = torch.randn(ops.num_blocks(numel), generator=generator).abs().exp() * 10.0 ** (seed % 37 - 18)
            assert torch.equal(ops.encode_again(dequantize(codes, scales), scales, dtype), codes)

    def test_every_code_of_every_scale(self, signed: bool) -> None:
        codes = torch.arange(-127, 128).to(torch.int8) if signed else torch.arange(256).to(torch.uint8)
        for exponent in range(-62, 63):
            for mantissa in (1.0, 1.2345, 1.9999999):
                scales = torch.tensor([mantissa * 2.0**exponent])
                again = ops.encode_again(dequantize(codes, scales), scales, codes.dtype)
                assert torch.equal(again, codes), (exponent, mantissa)

    def test_zero_and_non_finite_blocks(self, signed: bool) -> None:
        values = moments(1000, signed=signed)
        values[:256] = 0
        values[300] = math.inf
        values[301] = -math.inf if signed else math.inf
        values[600] = math.nan
        values[768:] = math.nan
        codes, scales = quantize(values, signed=signed)
        assert torch.equal(ops.encode_again(dequantize(codes, scales), scales, codes.dtype), codes)

    def test_blocks_of_an_infinite_scale(self, signed: bool) -> None:
        """As blocks with an infinity in them were stored before scales had signs: all of them NaN."""
        codes = torch.zeros(256, dtype=torch.int8 if signed else torch.uint8)
        scales = torch.tensor([math.inf])
        assert dequantize(codes, scales).isnan().all()
        assert torch.equal(ops.encode_again(dequantize(codes, scales), scales, codes.dtype), codes)

    def test_no_elements(self, signed: bool) -> None:
        dtype = torch.int8 if signed else torch.uint8
        assert ops.encode_again(torch.empty(0), torch.empty(0), dtype).numel() == 0


@both
def test_requantize_keeps_the_codes_of_blocks_that_are_as_they_were_decoded(signed: bool) -> None:
    """Of the others, their scales say nothing any more."""
    codes = (
        torch.arange(5 * 256 + 7).remainder(100).to(torch.int8 if signed else torch.uint8)
    )  # the largest is never used
    stored = torch.tensor([1.0, 2.0, 0.0, 3.0, math.nan, 0.5])
    before = dequantize(codes, stored)
    values = before.clone()
    values[260] *= 1.5
    values[1024 + 3] = math.nan
    values[3 * 256] = 100.0  # far above its scale
    again, scales = torch.empty_like(codes), torch.empty_like(stored)
    ops.requantize(values, stored.bfloat16(), again, scales)
    fresh, fresh_scales = quantize(values, signed=signed)
    for block in range(6):
        changed = block in (1, 3)
        where = slice(block * 256, (block + 1) * 256)
        expected = (fresh if changed else codes)[where]
        if block not in (2, 4):  # a scale of zero, or none, has one code for all
            assert torch.equal(again[where], expected), block
        assert torch.equal(scales[block], (fresh_scales if changed else stored)[block]) or block == 4
    decoded = dequantize(again, scales)
    assert decoded[1024:1280].isnan().all() and torch.equal(decoded[:256], before[:256])
    torch.testing.assert_close(decoded[256:1024], values[256:1024], rtol=0.02, atol=0.5)


@both
def test_requantize_reads_and_checks_all_before_it_writes(signed: bool) -> None:
    values, dtype = torch.rand(300), torch.int8 if signed else torch.uint8
    codes, scales = quantize(values, signed=signed)
    decoded = dequantize(codes, scales)
    again, in_place = torch.zeros(300, dtype=dtype), scales.clone()
    for stored in (torch.ones(1), torch.ones(2, dtype=torch.int32)):
        with pytest.raises(ConfigError, match="expected stored_scales to be 2 floating-point numbers, got"):
            ops.requantize(decoded, stored, again, in_place)
        assert not again.any() and torch.equal(in_place, scales)
    ops.requantize(decoded, in_place, again, in_place)
    assert torch.equal(again, codes) and torch.equal(in_place, scales)


def test_codes_of_real_steps_come_again() -> None:
    """In which second moments are rounded stochastically."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(10_000))
    optimizer = FusedAdamW([param], state_dtype=torch.int8, amsgrad=True)
    for step in range(30):
        param.grad = moments(10_000, signed=True, seed=step) * 10.0 ** -(step % 7)
        optimizer.step()
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            codes, scales = optimizer.state[param][name], optimizer.state[param][name + ops.SCALE_SUFFIX]
            assert torch.equal(ops.encode_again(dequantize(codes, scales), scales, codes.dtype), codes), (step, name)


def test_refuses_overlap() -> None:
    """Scales would be written over the values that are still to be encoded."""
    memory = torch.randn(512)
    codes = torch.zeros(512, dtype=torch.int8)
    for scales in (memory[:2], codes.view(torch.float32)[:2]):
        before = memory.clone()
        with pytest.raises(ConfigError, match="not to overlap in memory"):
            ops.quantize(memory, codes, scales)
        assert torch.equal(memory, before)
