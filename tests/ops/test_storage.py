"""How parameters and moments are stored: the remainder of a bfloat16, stochastic rounding and its random numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import reference
import torch
from op_cases import OPS
from step_cases import Stored, run, threads
from torch import Tensor

from zeroopt import ops
from zeroopt.errors import ConfigError

MASTER = ops.Storage(torch.bfloat16, "float32", torch.bfloat16, torch.float32)
REMAINDER = ops.Storage(torch.bfloat16, "remainder", torch.bfloat16, torch.float32)
STOCHASTIC = ops.Storage(torch.bfloat16, "none", torch.float32, torch.bfloat16)
# A step that only decodes and encodes: without momentum and weight decay, by a learning rate of 1.
PLAIN_SGD = OPS["sgd"].hyper(momentum=0, weight_decay=0, lr=1)


def float32_of_bits(bits: Tensor) -> Tensor:
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def awkward_floats(numel: int) -> Tensor:
    """Of every exponent and both signs; every third a tie, every tenth exact, every eleventh next to a tie."""
    bits = torch.randint(0, 2**32, (numel,), generator=torch.Generator().manual_seed(numel))
    for every, lower in ((3, 0x8000), (10, 0), (11, 0x7FFF), (13, 0x8001), (17, 0xFFFF)):
        bits[::every] = bits[::every] // 2**16 * 2**16 + lower
    values = float32_of_bits(bits)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-39])
    largest = torch.finfo(torch.float32).max
    values[: special.numel()] = special
    values[special.numel() : special.numel() + 2] = torch.tensor([largest, -largest])
    return values


def same_floats(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but any NaN equals any NaN."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


class TestStorage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                (torch.float64,),
                "expected parameters and master_weights to be one of .* got torch.float64 with 'float32'",
            ),
            ((torch.float32, "none"), "got torch.float32 with 'none'"),
            ((torch.float32, "remainder"), "got torch.float32 with 'remainder'"),
            ((torch.float16, "remainder"), "torch.bfloat16 with 'remainder', .* got torch.float16 with 'remainder'"),
            ((torch.float16, "none"), "got torch.float16 with 'none'"),
            ((torch.bfloat16, "exact"), "got torch.bfloat16 with 'exact'"),
            ((torch.float32, "float32", torch.float64), "expected gradients of float32, bfloat16 or float16"),
            (
                (torch.float32, "float32", torch.float32, torch.float16),
                "expected state_dtype to be float32, bfloat16 or",
            ),
        ],
    )
    def test_refuses(self, arguments: tuple[object, ...], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ops.Storage(*arguments)  # type: ignore[arg-type]

    def test_dtypes(self) -> None:
        assert [ops.Storage().master_dtype, MASTER.master_dtype] == [None, torch.float32]
        assert [REMAINDER.master_dtype, STOCHASTIC.master_dtype] == [torch.int16, None]
        eight = ops.Storage(state_dtype=torch.int8)
        assert [eight.dtype_of_state(signed=True), eight.dtype_of_state(signed=False)] == [torch.int8, torch.uint8]
        assert STOCHASTIC.dtype_of_state(signed=False) is torch.bfloat16
        assert [eight.has_scales, MASTER.has_scales] == [True, False]

    def test_blocks(self) -> None:
        assert [ops.num_blocks(numel) for numel in (0, 1, 255, 256, 257, 512, 513)] == [0, 1, 1, 1, 2, 2, 3]


class TestRemainder:
    def test_split_and_joined_values_are_the_same(self) -> None:
        """A step by nothing, over every kind of float32."""
        values = awkward_floats(100_000)
        arrays = {"param": values, "grad": torch.zeros(values.numel())}
        segment = Stored(OPS["sgd"], REMAINDER, hyper=PLAIN_SGD, values=arrays)
        run([segment])
        assert same_floats(reference.join(segment.raw["param"], segment.raw["master"]), values)
        assert same_floats(segment.raw["param"], reference.round_ties_away(values))
        with_master = Stored(OPS["sgd"], MASTER, hyper=PLAIN_SGD, values=arrays)
        with_master.raw["param"].zero_()
        run([with_master])
        assert same_floats(with_master.raw["param"], segment.raw["param"])

    def test_ties_go_away_from_zero(self) -> None:
        values = float32_of_bits(torch.tensor([0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x7F7FFFFF, 0x00008000]))
        segment = Stored(OPS["sgd"], REMAINDER, hyper=PLAIN_SGD, values={"param": values, "grad": torch.zeros(6)})
        run([segment])
        bits = segment.raw["param"].view(torch.int16).long() % 2**16
        assert bits.tolist() == [0x3F81, 0x3F82, 0xBF81, 0x3F80, 0x7F80, 0x0001]

    @pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.int8], ids=str)
    @pytest.mark.parametrize("name", OPS)
    def test_follows_the_float32_master_bit_for_bit(self, name: str, state: torch.dtype) -> None:
        """Over many steps of gradients of all sizes, from parameters of all sizes."""
        op, numel = OPS[name], 1000
        values = {state_name: torch.zeros(numel) for state_name in op.states}
        values["param"] = torch.cat([awkward_floats(numel // 2), torch.randn(numel // 2)])
        if name == "lamb":  # whose norms would make all of them NaN
            values["param"] = values["param"].nan_to_num(0, 0, 0).clamp(-1e15, 1e15)
        values["grad"] = torch.zeros(numel)
        segments = [
            Stored(op, ops.Storage(torch.bfloat16, weights, torch.bfloat16, state), values=values)
            for weights in ("float32", "remainder")
        ]
        steps = [torch.zeros(1), torch.zeros(1)]
        for step in range(60):
            grad = torch.randn(numel, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 7 - 3)
            for segment, steps_of in zip(segments, steps, strict=True):
                segment.raw["grad"].copy_(grad)
                run([segment], steps=steps_of, control=ops.StepControl(seed=5))
            master, remainder = (segment.raw for segment in segments)
            assert same_floats(remainder["param"], master["param"]), step
            assert same_floats(reference.join(remainder["param"], remainder["master"]), master["master"]), step
        for state_name in op.states_of(op.defaults):
            pair = [segment.raw[state_name] for segment in segments]
            assert torch.equal(*pair) if state is torch.int8 else same_floats(*pair)


def rounded_by_a_step(values: Tensor, *, seed: int = 0, key: int = 0, first: int = 0, step: int = 1) -> Tensor:
    """float32 values as a step rounds them into bfloat16 parameters: gradients of which they are the negative, from 0."""
    arrays = {"param": torch.zeros(values.numel()), "grad": -values}
    segment = Stored(OPS["sgd"], STOCHASTIC, hyper=PLAIN_SGD, values=arrays, key=key, first=first)
    run([segment], steps=torch.tensor([step - 1.0], dtype=torch.float64), control=ops.StepControl(seed=seed))
    return segment.raw["param"]


class TestRandomNumbers:
    @pytest.mark.parametrize(
        ("counter", "key", "rounds", "expected"),
        [
            ("00000000 " * 4, "00000000 " * 2, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
            ("ffffffff " * 4, "ffffffff " * 2, 7, "5207ddc2 45165e59 4d8ee751 8c52f662"),
            ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", 7, "4dfccaba 190a87f0 c47362ba b6b5242a"),
            ("00000000 " * 4, "00000000 " * 2, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ("ffffffff " * 4, "ffffffff " * 2, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", 10, "d16cfe09 94fdcceb 5001e420 24126ea1"),
        ],
    )
    def test_reference_gives_the_published_answers(self, counter: str, key: str, rounds: int, expected: str) -> None:
        """Random123's kat_vectors."""
        words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
        assert reference.philox4x32(words[0], words[1], rounds) == words[2]

    @pytest.mark.parametrize(
        ("seed", "step", "key", "first"),
        [
            (0, 1, 0, 0),
            (1, 1, 0, 0),
            (2**32, 1, 0, 0),
            (2**64 - 1, 2, 0, 0),
            (0, 1000, 0, 3),
            (0, 2**24 - 1, 1, 0),
            (0, 2**24 + 1, 1, 0),  # no float32
            (0, 2**32 - 1, 1, 0),
            (0, 1, 2**31, 13),
            (0, 1, 2**32 - 1, 8),
            (7, 1, 1, 2**35 - 5),
            (7, 1, 1, 2**60 - 5000),
        ],
    )
    def test_kernel_draws_those_of_the_reference(self, seed: int, step: int, key: int, first: int) -> None:
        """All 16 bits of each: a value with lower half r is rounded up just where the noise is 2**16 - r or more."""
        numel = 300
        noise = reference.noise(seed, step, key, 0, first, numel)
        for lower, up in ((2**16 - noise, True), (2**16 - noise - 1, False)):
            values = float32_of_bits(0x3F800000 + lower.clamp(0, 0xFFFF))
            bits = rounded_by_a_step(values, seed=seed, key=key, first=first, step=step).view(torch.int16).long()
            possible = lower <= 0xFFFF
            assert ((bits == 0x3F80 + up) | ~possible).all()
            assert possible.sum() > numel - 10

    def test_every_array_has_its_own(self) -> None:
        """SGD's first buffer is the gradient, of which its first parameter, from 0 and by a rate of 1, is the negative."""
        values = torch.randn(1000, generator=torch.Generator().manual_seed(2))
        arrays = {"param": torch.zeros(1000), "grad": values, "momentum_buffer": torch.zeros(1000)}
        hyper = OPS["sgd"].hyper(weight_decay=0, lr=1)
        segment = Stored(OPS["sgd"], STOCHASTIC, hyper=hyper, values=arrays)
        run([segment], steps=torch.zeros(1))
        for array, found in enumerate((-segment.raw["param"], segment.raw["momentum_buffer"])):
            assert same_floats(found, reference.round_stochastic(values, reference.noise(0, 1, 0, array, 0, 1000)))
        assert (segment.raw["momentum_buffer"] != -segment.raw["param"]).sum() > 250

    def test_differ_by_seed_step_key_and_element(self) -> None:
        values = torch.randn(4096)
        results = [
            rounded_by_a_step(values),
            rounded_by_a_step(values, seed=1),
            rounded_by_a_step(values, seed=2**32),
            rounded_by_a_step(values, step=2),
            rounded_by_a_step(values, key=1),
            rounded_by_a_step(values, first=1),
            rounded_by_a_step(values, first=4096),
        ]
        for i, a in enumerate(results):
            assert not any(torch.equal(a, b) for b in results[:i])

    def test_cutting_and_threads_change_nothing(self) -> None:
        """A parameter in one piece, and in pieces that begin anywhere, on any number of threads."""
        op, numel = OPS["adamw"], 60_000
        storage = STOCHASTIC
        whole = Stored(op, storage, numel, seed=1, key=9)
        cuts = [0, 1, 8, 21, 255, 300, 4096, 4099, 30_001, 50_000, numel]
        before = {name: array.clone() for name, array in whole.raw.items()}
        with threads(1):
            run([whole], control=ops.StepControl(seed=3))
        for count in (1, 2, 3):
            pieces = [
                Stored(
                    op,
                    storage,
                    values={n: a[i:j].float() for n, a in before.items()},
                    key=9,
                    first=i,
                    shifts={"param": i % 5},
                )
                for i, j in pairwise(cuts)
            ]
            with threads(count):
                run(pieces, control=ops.StepControl(seed=3))
            for name in ("param", *whole.states):
                assert torch.equal(torch.cat([piece.raw[name] for piece in pieces]), whole.raw[name]), (name, count)


class TestStochasticRounding:
    def test_goes_to_one_of_the_two_neighbours(self) -> None:
        values = awkward_floats(100_000)
        rounded = rounded_by_a_step(values)
        bits = values.view(torch.int32).long() % 2**32
        below, exact = bits // 2**16, bits % 2**16 == 0
        found = rounded.view(torch.int16).long() % 2**16
        known = values.isfinite() & (values != 0)  # 0 - -0 is 0
        assert ((found == below) | (found == below + 1) | ~known).all()
        assert ((found == below) | ~(known & exact)).all()
        assert same_floats(rounded[~values.isfinite()], values[~values.isfinite()].bfloat16())
        assert (rounded[values == 0] == 0).all()

    def test_rounds_as_the_reference_with_its_bits(self) -> None:
        values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
        expected = reference.round_stochastic(values, reference.noise(11, 4, 2, 0, 5, 5000))
        assert same_floats(rounded_by_a_step(values, seed=11, step=4, key=2, first=5), expected)

    def test_is_unbiased(self) -> None:
        """Over many seeds: the mean of n numbers that are 0 or 1 is off by 6 sigma once in 5e8; there are 64 of them."""
        values = float32_of_bits(0x3F800000 + 1024 * torch.arange(64))
        num_seeds = 2000
        total = torch.zeros(64, dtype=torch.float64)
        for seed in range(num_seeds):
            total += rounded_by_a_step(values, seed=seed).double()
        chance = torch.arange(64).double() / 64
        mean = (total / num_seeds - 1) * 128  # bfloat16 has 1/128 between 1 and 2
        assert ((mean - chance).abs() <= 6 * (chance * (1 - chance) / num_seeds).sqrt()).all()

    def test_is_unbiased_over_elements_steps_and_keys(self) -> None:
        values = torch.full((100_000,), 1 + 0.3 / 128)
        for options in ({}, {"step": 2}, {"key": 1}, {"first": 3}):
            mean = (rounded_by_a_step(values, **options).double().mean().item() - 1) * 128
            assert abs(mean - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 100_000)

    def test_small_updates_arrive(self) -> None:
        """Each a thirtieth of a unit in the last place: rounding to nearest would never move."""
        numel, num_steps = 4000, 300
        segment = Stored(
            OPS["sgd"],
            STOCHASTIC,
            hyper=PLAIN_SGD,
            values={"param": torch.ones(numel), "grad": torch.full((numel,), -1 / 3840)},
        )
        steps = torch.zeros(1)
        for _ in range(num_steps):
            run([segment], steps=steps)
        moved = segment.raw["param"].double().mean().item() - 1
        # An element's distance varies by less than sqrt(300 / 30) units of 1/128.
        assert abs(moved - num_steps / 3840) < 6 * math.sqrt(num_steps / 30 / numel) / 128
