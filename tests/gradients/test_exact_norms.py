"""Norms that are the same to the last bit however elements are shared, and right."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroopt import NotSupportedError
from zeroopt.gradients.exact_norms import NormTerm, exact_norm, exact_powers
from zeroopt.gradients.norm_groups import NormGroups


def norm_of(values: list[Tensor], norm_type: float = 2.0, numel: int = 1 << 30, factor: Tensor | None = None) -> Tensor:
    return exact_norm([NormTerm(each, 1.0, factor) for each in values], numel, None, NormGroups([]), norm_type)


def draw(seed: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 6, (numel,), generator=generator).double()
    return (torch.randn(numel, generator=generator) * 10.0**exponents).to(dtype)


@given(cuts=st.lists(st.integers(0, 50_000), max_size=6), seed=st.integers(0, 3), norm_type=st.sampled_from([1.0, 2.0]))
def test_how_elements_are_cut_and_ordered_does_not_change_a_bit(cuts: list[int], seed: int, norm_type: float) -> None:
    values = draw(seed, 50_000, torch.float32)
    shuffled = values[torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))]
    pieces = list(shuffled.tensor_split(sorted(cuts)))
    assert torch.equal(norm_of(pieces, norm_type), norm_of([values], norm_type))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_it_is_the_norm(dtype: torch.dtype, scale: float) -> None:
    values = (draw(1, 1000) * scale).to(dtype)
    exact = sum(Fraction(value) ** 2 for value in values.tolist())
    assert math.isclose(norm_of([values]).item(), math.sqrt(exact), rel_tol=1e-13)
    assert math.isclose(
        norm_of([values], 1.0).item(), float(sum(Fraction(abs(v)) for v in values.tolist())), rel_tol=1e-13
    )
    assert norm_of([values], math.inf) == values.abs().max()


@pytest.mark.parametrize("special", [0.0, math.inf, math.nan])
def test_zeros_and_what_is_not_finite(special: float) -> None:
    norm = norm_of([torch.tensor([special, 0.0]), torch.zeros(0)])
    assert norm.dtype is torch.float64 and norm.shape == ()
    assert torch.equal(norm, torch.tensor(special, dtype=torch.float64)) or (math.isnan(special) and norm.isnan())


def test_nothing_at_all() -> None:
    assert norm_of([torch.zeros(0)]) == 0


def test_ranks_exchange_exact_sums() -> None:
    values = draw(2, 3000)
    slices = list(values.split(1000))
    sent: list[list[Tensor]] = [[], [], []]

    def exchange(rank: int, round_of: int) -> Any:
        """A transport on which a rank says what it says, and hears what the others have said when they came to the same place."""
        count = iter(range(10))

        def gather_scalar(value: Tensor, *, label: str) -> Tensor:
            place = next(count)
            sent[rank][place:] = [value]
            return torch.stack([said[place] if len(said) > place else value for said in sent])

        return SimpleNamespace(gather_scalar=gather_scalar, num_slices=3)

    for round_of in range(5):  # in each, one number more is what it is where all come together
        norms = [
            exact_norm([NormTerm(slices[rank], 1.0, None)], 3000, exchange(rank, round_of), NormGroups([]), 2.0)
            for rank in range(3)
        ]
    assert norms[0] == norms[1] == norms[2] == norm_of([values], numel=3000)


def test_things_have_norms_of_their_own() -> None:
    values = [draw(seed, 500) * 10.0 ** (4 * seed) for seed in range(3)]
    terms = [[NormTerm(each[:200], 1.0, None), NormTerm(each[200:], 1.0, None)] for each in values]
    powers = exact_powers(terms, 1500, lambda told: told.unsqueeze(0), 2.0)
    assert powers.sqrt().tolist() == [norm_of([each], numel=1500).item() for each in values]


def test_factors_come_last() -> None:
    factor = torch.tensor(-0.25)
    values = draw(3, 100)
    assert norm_of([values], factor=factor) == norm_of([values]) / 4


def test_other_norms_are_refused() -> None:
    with pytest.raises(NotSupportedError, match="norms are those with p = 1, 2 or inf.*got p = 3.0"):
        norm_of([torch.ones(2)], 3.0)
