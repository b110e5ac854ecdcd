"""A norm whose bits do not depend on who adds up what: on how ranks, buckets or threads share the elements.

Floating-point sums depend on their order. So each term is rounded to a few multiples of fixed powers of two first, the same ones for all
terms, so coarse that sums of such multiples are exact (Demmel and Nguyen, 2013, "Fast reproducible floating-point summation"):

    |y| = |x| / 2^e < 1           2^e: above the largest element of all ranks, whose exponent they exchange first
    y^2 = t1 + t2 + t3 + rest     t1 a multiple of 2^-w, t2 of 2^-2w, t3 of 2^-3w, each what is left rounded to nearest
    S_k = sum of t_k              exact in float64 where 2^w times the number of elements is at most 2^51, whatever the order
    norm = 2^e sqrt(S1 + (S2 + S3))

With a billion elements w is 21. What is left out of a term is less than 2^-64 of the largest square, all together 2^-34 of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..collectives import Transport
from ..errors import NotSupportedError
from .norm_groups import NormGroups

_DIGITS = 52  # of a float64, that follow the first one
_MOST_EXPONENT = 1022  # of a normal float64


@dataclass(frozen=True)
class NormTerm:
    """Some elements, of which this rank adds up the powers.

    Attributes:
        values: 1-D, float32, float64 or 16 bits.
        weight: what they count for; exact where it is a power of two.
        factor: 0-dim, by which all of them have yet to be multiplied; None: nothing.
    """

    values: Tensor
    weight: float
    factor: Tensor | None


def exact_norm(
    terms: Sequence[NormTerm], numel: int, transport: Transport | None, beyond: NormGroups, norm_type: float
) -> Tensor:
    """The p-norm of the elements of all ranks, 0-dim float64, the same for every way to share them among ranks. Collective: exchanges of
    four scalars, and those of `beyond`.

    Args:
        terms: of this rank, at least one, whose factors are one tensor.
        numel: of all ranks, at least.
        transport: over whose slices to add up; None: each rank has all elements.
        beyond: the ranks that hold other parts of the model.

    Raises:
        NotSupportedError: p is none of 1, 2 and infinity.
    """
    factor = terms[0].factor
    assert all(term.factor is factor for term in terms)

    def gather(values: Tensor) -> Tensor:
        if transport is None:
            return values.unsqueeze(0)
        told = [transport.gather_scalar(value, label="gradient norms") for value in values.flatten().unbind()]
        # By slice; further replicas have the same.
        return torch.stack(told, dim=-1)[: transport.num_slices].reshape(-1, *values.shape)

    power = exact_powers([terms], numel, gather, norm_type)[0]
    if math.isinf(norm_type):
        norm = beyond.max_over_model(power)
    else:
        norm = beyond.sum_over_model(power).pow(1.0 / norm_type)
    return norm if factor is None else norm * factor.double().abs()


def exact_powers(
    terms: Sequence[Sequence[NormTerm]], numel: int, gather: Callable[[Tensor], Tensor], norm_type: float
) -> Tensor:
    """float64 [number of things]: of each the sum of |x|^p, or for infinity the largest |x|, over the elements of all ranks, without
    factors. Collective: `gather` is called twice, once for infinity.

    Args:
        terms: of each thing, what this rank has of it: at least one term, which may be empty.
        numel: of all ranks and things, at least.
        gather: gives what all ranks have told, one behind the other in a first dimension.

    Raises:
        NotSupportedError: p is none of 1, 2 and infinity.
    """
    if norm_type not in (1.0, 2.0, math.inf):
        raise NotSupportedError(
            f"with micro_batches, norms are those with p = 1, 2 or inf, whose bits do not depend on the number of ranks, got p = {norm_type}"
        )
    largest = gather(torch.stack([_largest(each) for each in terms])).amax(dim=0)
    if math.isinf(norm_type):
        return largest
    exponents = torch.frexp(largest).exponent.clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    scales = _power_of_two(-exponents).unbind()
    width = _DIGITS - 1 - numel.bit_length()
    # What is added to it is rounded to a multiple of 2^(-k * width).
    rounders = [math.ldexp(1.5, _DIGITS - k * width) for k in range(1, ops.SUM_PARTS + 1)]
    parts = [
        _sums_of_parts(each, scale, rounders, squared=norm_type == 2.0)
        for each, scale in zip(terms, scales, strict=True)
    ]
    first, second, third = gather(torch.stack(parts)).sum(dim=0).unbind(-1)
    total = first + (second + third)
    for _ in range(int(norm_type)):
        total = total * _power_of_two(exponents)
    return torch.where(largest.isfinite(), total, largest)


def _largest(terms: Sequence[NormTerm]) -> Tensor:
    """0-dim float64; NaN where there is one."""
    # A pass of few operations, unlike torch's norm.
    ends = [torch.stack(torch.aminmax(term.values)).abs().amax().double() for term in terms if term.values.numel()]
    return torch.stack(ends).amax() if ends else terms[0].values.new_zeros((), dtype=torch.float64)


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^exponent as float64, exactly, which `torch.ldexp` leaves to a function for all exponents.

    Args:
        exponents: integers.
    """
    return ((exponents.long() + 1023) << _DIGITS).view(torch.float64)


def _sums_of_parts(terms: Sequence[NormTerm], scale: Tensor, rounders: Sequence[float], *, squared: bool) -> Tensor:
    """float64 [parts]: exact sums of the parts of |x * scale|, or of its squares, all below 1."""
    sums = [
        ops.sum_in_parts(term.values, scale=scale, squared=squared, rounders=rounders) * term.weight for term in terms
    ]
    return torch.stack(sums).sum(dim=0)
