"""How far results may be apart, in units of the last place of a tensor's largest element."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 0
# Beyond two ranks the sum over ranks depends on its order, and Gloo's differs from ours.
SUM_ORDER_ULPS = 64

History = list[list[Tensor]]


def assert_same(results: list[list[History]], ulps: int) -> None:
    """On every rank, all variants follow the first one: bit for bit for 0 ulps."""
    for rank, variants in enumerate(results):
        expected = variants[0]
        for number, history in enumerate(variants[1:], start=1):
            for step, (want, got) in enumerate(zip(expected, history, strict=True)):
                for a, b in zip(want, got, strict=True):
                    assert_close(a, b, ulps, f"rank {rank}, variant {number}, step {step}")


def assert_close(want: Tensor, got: Tensor, ulps: int, where: str) -> None:
    if torch.equal(want, got):
        return
    largest = want.abs().max()
    ulp = torch.nextafter(largest, largest * 2) - largest
    difference = (want - got).abs().max() / ulp
    assert difference <= ulps, f"{where}: differs by {difference:.1f} ulp, {ulps} allowed"
