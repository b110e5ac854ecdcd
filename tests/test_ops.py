"""The kernels against obvious references and against torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zeroopt import ops
from zeroopt.errors import ConfigError, NotSupportedError

DTYPES = list(ops.DTYPE_CODES)
HALVES = [torch.bfloat16, torch.float16]
REDUCE_PAIRS = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in HALVES] + [(torch.float32, d) for d in HALVES]
LENGTHS = [*range(70), 127, 128, 129, 199, 200]
BIG = 2.0**24
SPECIAL = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-45, 6e-8, 65519.0, 65520.0, 3.4e38]

ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": 1}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0, "weight_decay": 0.1, "nesterov": 0, "maximize": 0}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but any NaN equals any NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
    return a.dtype is b.dtype and bool(equal.all())


def random_bits(dtype: torch.dtype, numel: int, seed: int) -> Tensor:
    """Every exponent, infinities, NaN and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (numel * size,), generator=generator, dtype=torch.uint8).view(dtype)


def adamw_row(**changes: float) -> list[float]:
    row = {**ADAMW, "amsgrad": 0, "maximize": 0, **changes}
    return list(row.values())


def sgd_row(**changes: float) -> list[float]:
    return list({**SGD, **changes}.values())


def tables(rows: Sequence[Sequence[int]], groups: Sequence[Sequence[float]], **changes: Any) -> dict[str, Tensor]:
    count = len(rows)
    result = {
        "segments": torch.tensor(rows, dtype=torch.int64).reshape(count, 3),
        "active": torch.ones(count, dtype=torch.uint8),
        "steps": torch.zeros(count),
        "groups": torch.tensor(groups, dtype=torch.float64),
    }
    return {**result, **changes}


def arrays(names: Sequence[str], numel: int, seed: int = 0, shift: int = 0) -> dict[str, Tensor]:
    """Random float32 arrays that begin `shift` elements after an aligned address; second moments are positive."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(numel + shift, generator=generator)[shift:] for name in names}
    for name, array in made.items():
        if name.endswith("_sq"):
            array.abs_()
    return made


ADAMW_ARRAYS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SGD_ARRAYS = ("param", "grad", "momentum_buffer")


class TestPack:
    @pytest.mark.parametrize("dst", DTYPES, ids=str)
    @pytest.mark.parametrize("src", DTYPES, ids=str)
    def test_equals_the_cast_of_torch(self, src: torch.dtype, dst: torch.dtype) -> None:
        for scale in (1.0, 0.3):
            for numel in LENGTHS:
                values = random_bits(src, numel, seed=numel)
                out = torch.empty(numel, dtype=dst)
                ops.pack(values, out, scale=scale)
                assert same_bits(out, reference.pack(values, dst, scale)), (numel, scale)

    @pytest.mark.parametrize("half", HALVES, ids=str)
    def test_every_16_bit_value(self, half: torch.dtype) -> None:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half)
        wide, back = torch.empty(2**16), torch.empty(2**16, dtype=half)
        ops.pack(values, wide)
        ops.pack(wide, back)
        assert same_bits(wide, values.float())
        assert same_bits(back, values)

    @pytest.mark.parametrize("half", HALVES, ids=str)
    def test_rounds_half_way_cases_to_even(self, half: torch.dtype) -> None:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half).float()
        finite = values[values.isfinite()].sort().values
        halfway = (finite[1:].double() + finite[:-1].double()).div(2).float()
        around = torch.cat([halfway, halfway.nextafter(torch.tensor(1e38)), halfway.nextafter(torch.tensor(-1e38))])
        out = torch.empty(around.numel(), dtype=half)
        ops.pack(around, out)
        assert same_bits(out, around.to(half))

    @pytest.mark.parametrize("dst", DTYPES, ids=str)
    def test_random_and_special_floats(self, dst: torch.dtype) -> None:
        values = torch.cat([random_bits(torch.float32, 200_000, seed=1), torch.tensor(SPECIAL)])
        out = torch.empty(values.numel(), dtype=dst)
        ops.pack(values, out)
        assert same_bits(out, values.to(dst))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_in_place(self, dtype: torch.dtype) -> None:
        values = torch.randn(1000).to(dtype)
        expected = reference.pack(values, dtype, 0.5)
        ops.pack(values, values, scale=0.5)
        assert same_bits(values, expected)

    def test_unaligned_views_touch_nothing_else(self) -> None:
        for shift in range(1, 17):
            src = torch.randn(100)[shift:]
            whole = torch.full((140,), 7.0, dtype=torch.bfloat16)
            ops.pack(src, whole[shift : shift + src.numel()])
            assert same_bits(whole[shift : shift + src.numel()], src.bfloat16())
            assert bool((whole[:shift] == 7).all()) and bool((whole[shift + src.numel() :] == 7).all())

    def test_equal_dense_strides(self) -> None:
        src = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
        dst = torch.empty_like(src, dtype=torch.float16)
        ops.pack(src, dst)
        assert torch.equal(dst, src.half())

    def test_many_elements_on_many_threads(self) -> None:
        values = torch.randn(1_000_003)
        out = torch.empty(values.numel(), dtype=torch.bfloat16)
        ops.pack(values, out, scale=3.0)
        assert same_bits(out, reference.pack(values, torch.bfloat16, 3.0))

    @pytest.mark.parametrize(
        ("src", "dst", "message"),
        [
            (torch.zeros(3, dtype=torch.int32), torch.zeros(3), "expected src to be float32, .* got torch.int32"),
            (torch.zeros(3), torch.zeros(4), "expected dst to have 3 elements as src, got 4"),
            (torch.zeros(3, 4).t(), torch.zeros(4, 3), "same strides"),
            (torch.zeros(8)[::2], torch.zeros(8)[::2], "same strides"),
        ],
        ids=["dtype", "numel", "layout", "gaps"],
    )
    def test_refuses(self, src: Tensor, dst: Tensor, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ops.pack(src, dst)

    def test_refuses_partial_overlap(self) -> None:
        whole = torch.zeros(10)
        with pytest.raises(ConfigError, match="expected src and dst not to overlap"):
            ops.pack(whole[:9], whole[1:])
        with pytest.raises(ConfigError, match="not to overlap"):
            ops.pack(whole.view(torch.bfloat16)[:10], whole)

    def test_refuses_other_devices(self) -> None:
        with pytest.raises(NotSupportedError, match="src is on meta"):
            ops.pack(torch.zeros(3, device="meta"), torch.zeros(3, device="meta"))


class TestCopy:
    @pytest.mark.parametrize("numel", [0, 1, 63, 64, 1000, 2**20 - 1, 2**20, 2**20 + 1, 3_000_007])
    @pytest.mark.parametrize("offset", [0, 1, 37])
    def test_copies_every_byte_and_no_other(self, numel: int, offset: int) -> None:
        source = random_bits(torch.bfloat16, numel // 2 + 1, seed=1).view(torch.uint8)[:numel]
        room = torch.full((numel + 100,), 7, dtype=torch.uint8)
        ops.copy(source, room[offset : offset + numel])
        assert torch.equal(room[offset : offset + numel], source)
        assert (room[:offset] == 7).all() and (room[offset + numel :] == 7).all()

    def test_refusals(self) -> None:
        values = torch.arange(20.0)
        with pytest.raises(ConfigError, match="expected dst to have 40 bytes as src, got 80"):
            ops.copy(values[:10], values.clone())
        with pytest.raises(ConfigError, match="expected src and dst to be contiguous"):
            ops.copy(values[::2], torch.empty(10))
        with pytest.raises(ConfigError, match="not to overlap"):
            ops.copy(values[:10], values[5:15])


class TestReduce:
    @pytest.mark.parametrize(("slice_dtype", "out_dtype"), REDUCE_PAIRS, ids=str)
    @pytest.mark.parametrize("num_slices", [*range(1, 18), 33, 100])
    @pytest.mark.parametrize("with_base", [False, True])
    def test_equals_the_reference(
        self, slice_dtype: torch.dtype, out_dtype: torch.dtype, num_slices: int, with_base: bool
    ) -> None:
        for numel in [*LENGTHS, 1023, 1024, 1025, 5000] if num_slices < 6 else [0, 1, 33, 5000]:
            slices = [random_bits(slice_dtype, numel, seed=k) for k in range(num_slices)]
            base = random_bits(out_dtype, numel, seed=99) if with_base else None
            out = torch.empty(numel, dtype=out_dtype)
            ops.reduce(slices, out, base=base)
            assert same_bits(out, reference.reduce(slices, out_dtype, base)), numel

    @pytest.mark.parametrize(("slice_dtype", "out_dtype"), REDUCE_PAIRS, ids=str)
    @pytest.mark.parametrize("num_slices", [2, 5])
    @pytest.mark.parametrize("with_base", [False, True])
    def test_what_goes_past_the_cache(
        self, slice_dtype: torch.dtype, out_dtype: torch.dtype, num_slices: int, with_base: bool
    ) -> None:
        """Sums of more than a megabyte, at an address that is no multiple of a cache line."""
        numel = 600_001
        slices = [random_bits(slice_dtype, numel, seed=k) for k in range(num_slices)]
        base = random_bits(out_dtype, numel, seed=99) if with_base else None
        room = torch.full((numel + 6,), 7.0, dtype=out_dtype)
        ops.reduce(slices, room[3:-3], base=base)
        assert same_bits(room[3:-3], reference.reduce(slices, out_dtype, base))
        assert (room[:3] == 7).all() and (room[-3:] == 7).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("num_slices", [*range(1, 18), 33, 100])
    def test_rounds_as_the_reference(self, num_slices: int, dtype: torch.dtype) -> None:
        """Numbers of like size, of which another order would give another sum."""
        slices = list(torch.randn(num_slices, 5000, dtype=dtype, generator=torch.Generator().manual_seed(num_slices)))
        out = torch.empty(5000, dtype=dtype)
        ops.reduce(slices, out)
        assert same_bits(out, reference.reduce(slices, dtype))

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([1, BIG], BIG),
            ([BIG, 1, 1], BIG),
            ([BIG, 0, 1, 1], BIG + 2),
            ([BIG, 0, 0, 0, 1], BIG),
            ([BIG, 0, 0, 0, 1, 1], BIG + 2),
            ([BIG, 0, 0, 1, 1, 0], BIG),
            ([BIG, 0, 0, 0, 1, 0, 1], BIG + 2),
            ([BIG, 0, 0, 0, 0, 0, 0, 1, 1], BIG),
        ],
        ids=str,
    )
    def test_order(self, values: list[float], expected: float) -> None:
        """BIG + 1 is rounded to BIG, so two ones count only where they are added to each other first."""
        out = torch.empty(1)
        ops.reduce([torch.tensor([float(value)]) for value in values], out)
        assert out.item() == expected

    @given(
        hosts=st.integers(1, 9),
        ranks=st.sampled_from([1, 2, 4, 8, 16]),
        numel=st.integers(1, 3000),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**32),
    )
    @settings(max_examples=50, deadline=None)
    def test_hosts_may_sum_first(self, hosts: int, ranks: int, numel: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        slices = list(torch.randn(hosts * ranks, numel, dtype=torch.float64, generator=generator).to(dtype))
        of_hosts = list(torch.empty(hosts, numel, dtype=torch.float64 if dtype is torch.float64 else torch.float32))
        for host, of_host in enumerate(of_hosts):
            ops.reduce(slices[host * ranks : (host + 1) * ranks], of_host)
        at_once, over_hosts = torch.empty(2, numel, dtype=dtype)
        ops.reduce(slices, at_once)
        ops.reduce(of_hosts, over_hosts)
        assert same_bits(at_once, over_hosts)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("num_slices", [1, 2, 3, 4, 5, 8, 12, 33])
    def test_out_may_be_base_or_a_slice(self, num_slices: int, dtype: torch.dtype) -> None:
        slices = [torch.randn(5000).to(dtype) for _ in range(num_slices)]
        base = torch.randn(5000).to(dtype)
        expected = reference.reduce(slices, dtype, base)
        into_base = base.clone()
        ops.reduce(slices, into_base, base=into_base)
        assert same_bits(into_base, expected)
        for index in {0, num_slices // 2, num_slices - 1}:
            copies = [piece.clone() for piece in slices]
            ops.reduce(copies, copies[index], base=base)
            assert same_bits(copies[index], expected)
            same = copies[index] = slices[index].clone()
            ops.reduce(copies, same, base=same)
            assert same_bits(same, reference.reduce(slices, dtype, slices[index]))

    def test_sums_in_float32(self) -> None:
        slices = [torch.tensor([256.0], dtype=torch.bfloat16)] + [torch.ones(1, dtype=torch.bfloat16)] * 8
        out = torch.empty(1, dtype=torch.bfloat16)
        ops.reduce(slices, out)
        assert out.item() == 264.0  # bfloat16 sums would stay at 256

    def test_unaligned_views(self) -> None:
        slices = [torch.randn(1100)[shift : shift + 1050] for shift in (1, 3, 6)]
        out = torch.full((1060,), 7.0)
        ops.reduce(slices, out[5:1055])
        assert same_bits(out[5:1055], reference.reduce(slices, torch.float32))
        assert bool((out[:5] == 7).all()) and bool((out[1055:] == 7).all())

    @pytest.mark.parametrize(
        ("slices", "out", "base", "message"),
        [
            ([], torch.zeros(3), None, "at least one tensor"),
            ([torch.zeros(3), torch.zeros(4)], torch.zeros(3), None, r"expected slices\[1\] to be 1-D .* 3 elements"),
            ([torch.zeros(3), torch.zeros(3).half()], torch.zeros(3), None, r"slices\[1\] to be torch.float32"),
            ([torch.zeros(3)], torch.zeros(3).double(), None, "expected out to be torch.float32"),
            ([torch.zeros(3).half()], torch.zeros(3).bfloat16(), None, "expected out to be torch.float16"),
            ([torch.zeros(3)], torch.zeros(3), torch.zeros(3).half(), "expected base to be torch.float32"),
            ([torch.zeros(1, 3)], torch.zeros(3), None, "1-D"),
            ([torch.zeros(6)[::2]], torch.zeros(3), None, "contiguous"),
        ],
        ids=["none", "numel", "dtypes", "double", "halves", "base", "shape", "strides"],
    )
    def test_refuses(self, slices: list[Tensor], out: Tensor, base: Tensor | None, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ops.reduce(slices, out, base=base)

    def test_refuses_partial_overlap(self) -> None:
        whole = torch.zeros(10)
        with pytest.raises(ConfigError, match=r"slices\[0\] and out not to overlap"):
            ops.reduce([whole[1:]], whole[:9])


class TestAdamW:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"decoupled": 0},
            {"decoupled": 0, "maximize": 1},
            {"amsgrad": 1},
            {"maximize": 1},
            {"weight_decay": 0},
            {"beta1": 0.0},
            {"beta1": 0.3},
        ],
        ids=str,
    )
    def test_follows_torch_and_the_reference(self, changes: dict[str, float]) -> None:
        row = adamw_row(**changes)
        lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize = row
        state = arrays(ADAMW_ARRAYS, 1003)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            state[name].zero_()
        if not amsgrad:
            del state["max_exp_avg_sq"]
        table = tables([[0, 1003, 0]], [row])
        theirs = torch.nn.Parameter(state["param"].clone())
        make = torch.optim.AdamW if decoupled else torch.optim.Adam
        betas, flags = (beta1, beta2), {"amsgrad": bool(amsgrad), "maximize": bool(maximize)}
        optimizer = make([theirs], lr, betas, eps, weight_decay, **flags)
        exact = {name: array.double() for name, array in state.items()}
        for step in range(5):
            grad = torch.randn(1003, generator=torch.Generator().manual_seed(step))
            state["grad"].copy_(grad)
            exact["grad"] = grad.double()
            exact = reference.adamw(exact, **{**table, "steps": torch.full((1,), float(step))})
            exact.pop("steps")
            ops.adamw(**state, **table)
            theirs.grad = grad
            optimizer.step()
        assert table["steps"].item() == 5
        # A few roundings of 6e-8 a step, relative to parameters of about 1.
        torch.testing.assert_close(state["param"], theirs.detach(), rtol=3e-7, atol=3e-7)
        for name in state.keys() - {"grad", "param"}:
            torch.testing.assert_close(state[name], optimizer.state[theirs][name], rtol=1e-6, atol=1e-7)
        for name in state.keys() - {"grad"}:
            torch.testing.assert_close(state[name].double(), exact[name], rtol=1e-6, atol=5e-7)

    def test_every_length_and_start(self) -> None:
        for numel in LENGTHS:
            check_one_step(
                ops.adamw, reference.adamw, ADAMW_ARRAYS, adamw_row(amsgrad=numel % 2), numel, shift=numel % 7
            )

    def test_segments_groups_and_steps_are_independent(self) -> None:
        groups = [adamw_row(), adamw_row(lr=0.1, decoupled=0), adamw_row(amsgrad=1, maximize=1)]
        check_many_segments(ops.adamw, reference.adamw, ADAMW_ARRAYS, groups)

    def test_infinite_parameter_does_not_spoil_its_moments(self) -> None:
        state = arrays(ADAMW_ARRAYS[:4], 4)
        state["param"][1] = float("inf")
        ops.adamw(**state, **tables([[0, 4, 0]], [adamw_row()]))
        assert bool(state["exp_avg"].isfinite().all()) and bool(state["exp_avg_sq"].isfinite().all())

    def test_nan_gradient_reaches_the_maximum(self) -> None:
        state = arrays(ADAMW_ARRAYS, 4)
        state["grad"][2] = float("nan")
        ops.adamw(**state, **tables([[0, 4, 0]], [adamw_row(amsgrad=1)]))
        assert state["max_exp_avg_sq"].isnan().tolist() == [False, False, True, False]
        assert state["param"].isnan().tolist() == [False, False, True, False]

    def test_refuses_amsgrad_without_its_array(self) -> None:
        with pytest.raises(
            ConfigError, match="max_exp_avg_sq to be a tensor, for the group of an active segment has amsgrad"
        ):
            ops.adamw(**arrays(ADAMW_ARRAYS[:4], 8), **tables([[0, 8, 0]], [adamw_row(amsgrad=1)]))


class TestSgd:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"momentum": 0},
            {"dampening": 0.5},
            {"nesterov": 1},
            {"maximize": 1},
            {"weight_decay": 0},
            {"momentum": 0, "maximize": 1},
        ],
        ids=str,
    )
    def test_follows_torch_and_the_reference(self, changes: dict[str, float]) -> None:
        row = sgd_row(**changes)
        lr, momentum, dampening, weight_decay, nesterov, maximize = row
        state = arrays(SGD_ARRAYS, 1003)  # the buffer holds garbage that the first step must overwrite
        table = tables([[0, 1003, 0]], [row])
        theirs = torch.nn.Parameter(state["param"].clone())
        flags = {"nesterov": bool(nesterov), "maximize": bool(maximize)}
        optimizer = torch.optim.SGD([theirs], lr, momentum, dampening, weight_decay, **flags)
        untouched = state["momentum_buffer"].clone()
        exact = {name: array.double() for name, array in state.items()}
        for step in range(5):
            grad = torch.randn(1003, generator=torch.Generator().manual_seed(step))
            state["grad"].copy_(grad)
            exact["grad"] = grad.double()
            exact = reference.sgd(exact, **{**table, "steps": torch.full((1,), float(step))})
            exact.pop("steps")
            ops.sgd(**state, **table)
            theirs.grad = grad
            optimizer.step()
        torch.testing.assert_close(state["param"], theirs.detach(), rtol=3e-7, atol=3e-7)
        torch.testing.assert_close(state["param"].double(), exact["param"], rtol=1e-6, atol=5e-7)
        if momentum:
            expected = optimizer.state[theirs]["momentum_buffer"]
            torch.testing.assert_close(state["momentum_buffer"], expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(state["momentum_buffer"], untouched)

    def test_every_length_and_start(self) -> None:
        for numel in LENGTHS:
            check_one_step(ops.sgd, reference.sgd, SGD_ARRAYS, sgd_row(nesterov=numel % 2), numel, shift=numel % 7)

    def test_segments_groups_and_steps_are_independent(self) -> None:
        groups = [sgd_row(), sgd_row(momentum=0, lr=0.1), sgd_row(nesterov=1, maximize=1)]
        check_many_segments(ops.sgd, reference.sgd, SGD_ARRAYS, groups)

    def test_no_buffer_without_momentum(self) -> None:
        state = arrays(SGD_ARRAYS[:2], 100)
        expected = reference.sgd(state, **tables([[0, 100, 0]], [sgd_row(momentum=0)]))
        ops.sgd(**state, momentum_buffer=None, **tables([[0, 100, 0]], [sgd_row(momentum=0)]))
        torch.testing.assert_close(state["param"].double(), expected["param"], rtol=3e-7, atol=3e-7)

    def test_refuses_momentum_without_its_array(self) -> None:
        with pytest.raises(
            ConfigError, match="momentum_buffer to be a tensor, for the group of an active segment has momentum"
        ):
            ops.sgd(**arrays(SGD_ARRAYS[:2], 8), momentum_buffer=None, **tables([[0, 8, 0]], [sgd_row()]))


Kernel = Callable[..., None]
Reference = Callable[..., dict[str, Tensor]]


def check_one_step(
    kernel: Kernel, expect: Reference, names: Sequence[str], row: list[float], numel: int, shift: int
) -> None:
    """One step over one segment that begins `shift` elements into arrays of `numel`, at an unaligned address."""
    state = arrays(names, numel, seed=numel, shift=shift)
    rows = [[shift, numel - shift, 0]] if numel > shift else []
    table = tables(rows, [row], steps=torch.full((len(rows),), 3.0))
    expected = expect(state, **table)
    kernel(**state, **table)
    for name in names:
        torch.testing.assert_close(state[name].double(), expected[name], rtol=5e-7, atol=5e-7)


def check_many_segments(kernel: Kernel, expect: Reference, names: Sequence[str], groups: list[list[float]]) -> None:
    """Segments of all sizes with gaps between them, over more elements than one thread takes."""
    sizes = [1, 5, 16, 64, 1000, 100_003, 7, 20_000, 63, 30_000]
    rows, offset = [], 3
    for i, size in enumerate(sizes):
        rows.append([offset, size, i % len(groups)])
        offset += size + i
    state = arrays(names, offset + 9)
    before = {name: array.clone() for name, array in state.items()}
    steps = torch.arange(float(len(sizes)))
    active = torch.tensor([i not in (3, 7) for i in range(len(sizes))], dtype=torch.uint8)
    table = tables(rows[::-1], groups, steps=steps, active=active)  # the order of the rows does not matter
    expected = expect(state, **table)
    kernel(**state, **table)
    assert torch.equal(table["steps"], expected["steps"])
    stepped = torch.zeros(offset + 9, dtype=torch.bool)
    for i, (start, size, _) in enumerate(rows[::-1]):
        stepped[start : start + size] = bool(active[i])
    for name in names:
        torch.testing.assert_close(state[name].double(), expected[name], rtol=5e-7, atol=5e-7)
        assert torch.equal(state[name][~stepped], before[name][~stepped])


class TestTables:
    def test_nothing_to_do(self) -> None:
        for numel in (0, 5):
            state = arrays(ADAMW_ARRAYS[:4], numel)
            before = state["param"].clone()
            ops.adamw(**state, **tables([], [adamw_row()]))
            assert torch.equal(state["param"], before)

    def test_checked_table_gives_the_same(self) -> None:
        one, two = arrays(ADAMW_ARRAYS, 300), arrays(ADAMW_ARRAYS, 300)
        table = tables([[0, 100, 0], [128, 100, 0]], [adamw_row()])
        ops.adamw(**one, **table)
        table["steps"].zero_()
        checked = ops.SegmentTable.check(table.pop("segments"))
        ops.adamw(**two, segments=checked, **table)
        assert torch.equal(one["param"], two["param"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"param": torch.zeros(8).double()}, "expected param to be float32, got torch.float64"),
            ({"grad": torch.zeros(9)}, "expected grad to be 1-D and contiguous with 8 elements"),
            ({"exp_avg": torch.zeros(16)[::2]}, "expected exp_avg to be 1-D and contiguous"),
            ({"exp_avg_sq": torch.zeros(2, 4)}, "expected exp_avg_sq to be 1-D"),
            ({"grad": torch.zeros(8, device="meta")}, "expected grad to be on cpu, got meta"),
            ({"segments": torch.tensor([[0, 8, 0]], dtype=torch.int32)}, "expected segments to be int64"),
            ({"segments": torch.tensor([0, 8, 0])}, r"expected segments to be contiguous of shape \[n, 3\]"),
            ({"segments": torch.tensor([[0, 9, 0]])}, "end within the 8 elements of param, got an end of 9"),
            ({"segments": torch.tensor([[-1, 4, 0]])}, "offsets of at least 0"),
            ({"segments": torch.tensor([[0, 0, 0]])}, "at least one element"),
            ({"segments": torch.tensor([[0, 4, -1]])}, "group indices of at least 0"),
            ({"segments": torch.tensor([[0, 4, 1]])}, "expected groups to have a row for every group"),
            ({"segments": torch.tensor([[4, 4, 0], [0, 5, 0]])}, "expected segments not to overlap"),
            ({"active": torch.ones(1)}, "expected active to be torch.uint8, got torch.float32"),
            ({"steps": torch.zeros(2)}, r"expected steps to be contiguous of shape \[1\], got \[2\]"),
            ({"groups": torch.zeros(1, 6, dtype=torch.float64)}, r"expected groups to be contiguous of shape \[1, 8\]"),
        ],
    )
    def test_refuses(self, changes: dict[str, Tensor], message: str) -> None:
        if "segments" in changes and changes["segments"].dim() == 2:
            count = changes["segments"].shape[0]
            changes = {"active": torch.ones(count, dtype=torch.uint8), "steps": torch.zeros(count), **changes}
        call = {**arrays(ADAMW_ARRAYS[:4], 8), **tables([[0, 8, 0]], [adamw_row()]), **changes}
        with pytest.raises(ConfigError, match=message):
            ops.adamw(**call)

    def test_refuses_arrays_that_overlap(self) -> None:
        whole = torch.zeros(12)
        state = {**arrays(ADAMW_ARRAYS[:4], 8), "param": whole[:8], "exp_avg": whole[4:]}
        with pytest.raises(ConfigError, match="expected param and exp_avg not to overlap"):
            ops.adamw(**state, **tables([[0, 8, 0]], [adamw_row()]))
