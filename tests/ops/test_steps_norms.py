"""Sums of squares: of gradients, and of LAMB's parameters and updates."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import reference
import torch
from op_cases import OPS
from step_cases import FEW_STORAGES, HALVES, Stored, run, storage_name, table_of, threads
from torch import Tensor

from zeroopt import ops
from zeroopt.errors import ConfigError

GRADS = [torch.float32, *HALVES]
NUMELS = [*range(1, 71), 255, 256, 257, 4095, 4096, 4097, 50_000]
LAMB = OPS["lamb"]


def segments_of(grads: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Stored]:
    """Segments with these gradients, at addresses that are not aligned."""
    return [
        Stored(
            OPS["sgd"],
            ops.Storage(grad_dtype=dtype),
            hyper=OPS["sgd"].hyper(momentum=0),
            values={"param": torch.zeros(grad.numel()), "grad": grad},
            shifts={"grad": number % 9},
        )
        for number, grad in enumerate(grads)
    ]


def squared_norms(segments: list[Stored], active: Tensor | None = None, found_inf: float = 0) -> tuple[Tensor, float]:
    active = torch.ones(len(segments), dtype=torch.uint8) if active is None else active
    found = torch.tensor([float(found_inf)])
    return ops.squared_norms(table_of(segments), active=active, found_inf=found), found.item()


class TestSquaredNorms:
    @pytest.mark.parametrize("dtype", GRADS, ids=str)
    def test_follows_the_reference(self, dtype: torch.dtype) -> None:
        segments = segments_of([torch.randn(numel) for numel in NUMELS], dtype)
        before = [segment.everything() for segment in segments]
        norms, found_inf = squared_norms(segments)
        assert norms.dtype is torch.float64 and found_inf == 0
        for segment, norm in zip(segments, norms.tolist(), strict=True):
            assert math.isclose(norm, reference.squared_norm(segment.raw["grad"]), rel_tol=1e-12)
        assert [segment.everything() for segment in segments] == before

    def test_inactive_segments_are_0_and_their_gradients_not_looked_at(self) -> None:
        segments = segments_of([torch.ones(5), torch.full((5000,), torch.nan), torch.ones(7)])
        norms, found_inf = squared_norms(segments, torch.tensor([1, 0, 1], dtype=torch.uint8))
        assert norms.tolist() == [5, 0, 7] and found_inf == 0

    @pytest.mark.parametrize("dtype", GRADS, ids=str)
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_what_is_not_finite_is_found_wherever_it_is(self, bad: float, dtype: torch.dtype) -> None:
        for numel in (1, 15, 16, 17, 4097, 70_000):
            for at in {0, numel // 2, numel - 1}:
                grads = [torch.ones(20), torch.ones(numel), torch.ones(20)]
                grads[1][at] = bad
                norms, found_inf = squared_norms(segments_of(grads, dtype))
                assert found_inf == 1
                assert norms.isfinite().tolist() == [True, False, True]

    @pytest.mark.parametrize("before", [0.0, 1.0])
    def test_found_inf_stays_where_all_are_finite(self, before: float) -> None:
        assert squared_norms(segments_of([torch.ones(100)]), found_inf=before)[1] == before

    def test_squares_beyond_float32(self) -> None:
        """Above its largest and below its smallest number."""
        largest = torch.finfo(torch.float32).max
        norms, found_inf = squared_norms(segments_of([torch.full((70_000,), largest), torch.full((10,), 1e-45)]))
        assert found_inf == 0
        assert math.isclose(norms[0].item(), 70_000 * largest**2, rel_tol=1e-12)
        assert math.isclose(norms[1].item(), 10 * (2.0**-149) ** 2, rel_tol=1e-12)

    @pytest.mark.parametrize("dtype", GRADS, ids=str)
    def test_depend_on_the_segment_alone(self, dtype: torch.dtype) -> None:
        """Bit for bit: not on the number of threads, on other segments, or on where it begins."""
        grads = [torch.randn(numel) for numel in (100_003, 17, 5000, 60_000)]
        alone = [squared_norms(segments_of([grad], dtype))[0].item() for grad in grads]
        for count in (1, 2, 3):
            with threads(count):
                assert squared_norms(segments_of(grads, dtype))[0].tolist() == alone
                assert squared_norms(segments_of(grads[::-1], dtype))[0].tolist() == alone[::-1]

    def test_no_segments(self) -> None:
        norms, found_inf = squared_norms([])
        assert norms.shape == (0,) and found_inf == 0

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"active": torch.ones(1)}, "expected active to be torch.uint8, got torch.float32"),
            (
                {"active": torch.ones(2, dtype=torch.uint8)},
                r"expected active to be contiguous of shape \[1\], got \[2\]",
            ),
            ({"found_inf": torch.zeros(1).double()}, "expected found_inf to be torch.float32, got torch.float64"),
            ({"found_inf": torch.zeros(2)}, "expected found_inf to have one element, got 2"),
            ({"found_inf": torch.zeros(1, device="meta")}, "expected found_inf to be on cpu, got meta"),
            (
                {"table": ops.SegmentTable(ops.Storage(), [ops.SegmentArrays(torch.zeros(4))])},
                "segment to have a gradient",
            ),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], message: str) -> None:
        call: dict[str, Any] = {
            "table": table_of(segments_of([torch.ones(4)])),
            "active": torch.ones(1, dtype=torch.uint8),
            "found_inf": torch.zeros(1),
        }
        with pytest.raises(ConfigError, match=message):
            ops.squared_norms(**{**call, **changes})


class TestLambSquares:
    def pieces(self, whole: Stored, cuts: list[int]) -> list[Stored]:
        values = {name: array.float() for name, array in whole.values().items()}
        return [
            Stored(
                LAMB, whole.storage, values={name: array[a:b] for name, array in values.items()}, key=whole.key, first=a
            )
            for a, b in pairwise(cuts)
        ]

    @pytest.mark.parametrize("storage", FEW_STORAGES, ids=storage_name)
    def test_a_parameter_in_pieces_whose_sums_are_added_up(self, storage: ops.Storage) -> None:
        """With 8-bit states cut at multiples of a block, as wrap does."""
        whole = Stored(LAMB, storage, 20_000, seed=4, key=2)
        pieces = self.pieces(whole, [0, 256, 1024, 12_800, 20_000])
        run([whole])

        def add_up(squares: Tensor) -> None:
            squares[:] = squares.sum(0)

        run(pieces, reduce_squares=add_up)
        for name in ("param", *LAMB.states):
            joined = torch.cat([piece.raw[name] for piece in pieces])
            if joined.dtype is torch.float32:  # the sums may differ in the last bit
                torch.testing.assert_close(joined, whole.raw[name], rtol=3e-7, atol=3e-7)
            else:
                assert (joined == whole.raw[name]).float().mean() > 0.999

    def test_without_them_every_segment_has_its_own_ratio(self) -> None:
        whole = Stored(LAMB, numel=2000, seed=4)
        pieces = self.pieces(whole, [0, 1000, 2000])
        run([whole])
        run(pieces)
        joined = torch.cat([piece.raw["param"] for piece in pieces])
        assert not torch.allclose(joined, whole.raw["param"], rtol=1e-4)

    def test_sums_are_those_of_the_reference(self) -> None:
        segments = [Stored(LAMB, numel=numel, seed=numel) for numel in (1, 17, 4097, 50_000)]
        expected = [reference.lamb_moments(segment.values(), 3, **LAMB.hyper())[1] for segment in segments]
        found = []
        active = torch.tensor([1, 1, 0, 1], dtype=torch.uint8)
        run(segments, active=active, reduce_squares=lambda squares: found.append(squares.clone()))
        assert found[0].dtype is torch.float64 and found[0][2].tolist() == [0, 0]
        for number in (0, 1, 3):  # the parameter's are exact, the update's are of float32 values
            assert math.isclose(found[0][number, 0].item(), expected[number][0], rel_tol=1e-12)
            assert math.isclose(found[0][number, 1].item(), expected[number][1], rel_tol=1e-6)
