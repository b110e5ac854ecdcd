"""A table packs as `pack_segments` does, again and again, and leaves alone what is not as it has been told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zeroopt import ops

from .process import PretendProcess

pytestmark = pytest.mark.slow

OFFSETS = (3, 40, 60, 70)  # of a matrix, a transposed one, nothing and a number, in 80 elements


def _sources(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to("cuda", dtype)

    return [draw(5, 6), draw(2, 4).t(), draw(0), draw(1)[0]]


def _places(full: Tensor) -> list[Tensor]:
    return [full.as_strided(s.shape, s.stride(), offset) for s, offset in zip(_sources(), OFFSETS, strict=True)]


def _table() -> ops.PackTable:
    sources = _sources()
    return ops.PackTable([s.shape for s in sources], [s.stride() for s in sources], OFFSETS)


def _pack_twice(src: torch.dtype, dst: torch.dtype) -> list[bool]:
    table = _table()
    found = []
    for scale in (1.0, 0.3):
        sources = _sources(src)
        full, expected = (torch.full((80,), 7.0, dtype=dst, device="cuda") for _ in range(2))
        ops.pack_segments(sources, _places(expected), scale=scale)
        found += [table.pack(sources, full, scale=scale), torch.equal(full.cpu(), expected.cpu())]
    return found


@pytest.mark.parametrize(("src", "dst"), [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=str)
def test_the_same_bits(src: torch.dtype, dst: torch.dtype, on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_pack_twice, src, dst) == [True] * 4


def _pack_in_place() -> tuple[bool, Tensor, Tensor]:
    full, expected = torch.arange(80.0, device="cuda"), torch.arange(80.0, device="cuda")
    packed = _table().pack(_places(full), full, scale=0.5)
    ops.pack_segments(_places(expected), _places(expected), scale=0.5)
    return packed, full.cpu(), expected.cpu()


def test_sources_may_be_what_is_to_be_written(on_pretend_cuda: PretendProcess) -> None:
    packed, full, expected = on_pretend_cuda(_pack_in_place)
    assert packed and torch.equal(full, expected) and full[3] == 1.5


UNLIKE: dict[str, Callable[[list[Tensor], Tensor], list[Tensor]]] = {
    "shape": lambda sources, full: [sources[0].view(6, 5), *sources[1:]],
    "strides": lambda sources, full: [sources[0], sources[1].contiguous(), *sources[2:]],
    "two dtypes": lambda sources, full: [sources[0].half(), *sources[1:]],
    "integers": lambda sources, full: [source.int() for source in sources],
    "sparse": lambda sources, full: [sources[0].cpu().to_sparse(), *sources[1:]],
    "on the host": lambda sources, full: [source.cpu() for source in sources],
    "with the other sign": lambda sources, full: [torch._neg_view(sources[0]), *sources[1:]],
    "one less": lambda sources, full: sources[:-1],
    "in another's place": lambda sources, full: [full[10:40].view(5, 6), *sources[1:]],
}


def _try(name: str) -> tuple[bool, Tensor]:
    full = torch.full((80,), 7.0, device="cuda")
    return _table().pack(UNLIKE[name](_sources(), full), full), full.cpu()


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_unlike_is_left_alone(name: str, on_pretend_cuda: PretendProcess) -> None:
    packed, full = on_pretend_cuda(_try, name)
    assert not packed and bool((full == 7).all())
