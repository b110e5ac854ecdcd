"""Alone in its group, a rank has every result at once, and nothing moves that need not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from zeroopt.collectives.lone import lone_group
from zeroopt.collectives.single import SingleTransport
from zeroopt.collectives.site import Site
from zeroopt.collectives.wire import PLAIN, Wire

CPU = torch.device("cpu")


class Doubling(Wire):
    """What it combines is no plain sum, so that even a rank alone has to go by it."""

    backend_sums = False

    def combine(self, slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
        super().combine([2 * part for part in slices], out, base)


@pytest.fixture
def transport() -> SingleTransport:
    return SingleTransport(lone_group())


def filled(transport: SingleTransport) -> Tensor:
    full = transport.allocate(6, torch.float32, CPU)
    return full.copy_(torch.arange(6.0))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_serves_groups_of_one(size: int) -> None:
    site = Site(dist.ProcessGroup(0, size), CPU)  # type: ignore[call-arg]
    assert SingleTransport.serves(site) is (size == 1)


def test_the_whole_bucket_is_its_slice(transport: SingleTransport) -> None:
    full = filled(transport)
    assert (transport.num_slices, transport.slice_index) == (1, 0)
    assert torch.equal(transport.own_slice(full), full)


@pytest.mark.parametrize(("wire", "factor"), [(PLAIN, 1), (Doubling(), 2)], ids=["plain", "doubling"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("base", [None, 10.0])
def test_a_sum_is_what_the_wire_makes_of_one_rank(
    transport: SingleTransport, wire: Wire, factor: int, apart: bool, base: float | None
) -> None:
    full = filled(transport)
    out = torch.full((6,), -1.0) if apart else transport.own_slice(full)
    added = None if base is None else torch.full((6,), base)
    transport.start_reduce_scatter(full, out, added, wire=wire).finish()
    assert torch.equal(out, factor * torch.arange(6.0) + (base or 0.0))
    if apart:
        assert torch.equal(full, torch.arange(6.0))


def test_a_base_may_be_where_the_sum_goes(transport: SingleTransport) -> None:
    full, out = filled(transport), torch.ones(6)
    transport.start_reduce_scatter(full, out, out).finish()
    assert torch.equal(out, torch.arange(6.0) + 1)


def test_sums_of_16_bits_may_be_wider(transport: SingleTransport) -> None:
    full = filled(transport).bfloat16()
    out, base = torch.zeros(6), torch.full((6,), 2.0**-20)
    transport.start_reduce_scatter(full, out, base).finish()
    assert torch.equal(out, torch.arange(6.0) + 2.0**-20)


def test_a_gather_leaves_the_bucket_as_it_is(transport: SingleTransport) -> None:
    full = filled(transport)
    pending = transport.start_all_gather(full)
    pending.finish()
    pending.wait_until_read()
    assert torch.equal(full, torch.arange(6.0))


def test_numbers_are_its_own(transport: SingleTransport) -> None:
    flags, out = torch.tensor([0, 1, 7], dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)
    transport.start_max(flags, out).finish()
    assert out.tolist() == [0, 1, 7]
    flags.zero_()
    assert out.tolist() == [0, 1, 7], "a copy"
    assert transport.gather_scalar(torch.tensor(1 / 3, dtype=torch.float64)).tolist() == [1 / 3]
    transport.barrier()
    assert transport.sent_bytes == 0


def test_memory_is_shared_with_nobody_and_may_be_asked_for(transport: SingleTransport) -> None:
    assert transport.shares_parameters and transport.writes_parameters
    buffer = transport.allocate(5, torch.float16, CPU, shared=True)
    assert buffer.tolist() == [0.0] * 5 and buffer.dtype is torch.float16
