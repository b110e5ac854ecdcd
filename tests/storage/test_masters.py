"""Exact values of parameters: what is written is read again, and the model has it rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zeroopt.options.precision import Precision
from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.storage.masters import MASTER_NAMES, Float32Master, InPlace, Master, Remainder, exact_param, make_master
from zeroopt.storage.segment import Segment

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

KINDS = {
    "float32": (F32, Precision(), InPlace),
    "float64": (F64, Precision(), InPlace),
    "bfloat16 as it came": (BF16, Precision(), InPlace),
    "bfloat16, no master": (BF16, Precision(BF16, "none"), InPlace),
    "bfloat16 with master": (BF16, Precision(BF16), Float32Master),
    "float16 with master": (F16, Precision(F16), Float32Master),
    "bfloat16 with remainder": (BF16, Precision(BF16, "remainder"), Remainder),
}


def values(numel: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)


def made(kind: str, numel: int = 40) -> Master:
    dtype, precision, cls = KINDS[kind]
    master = make_master(torch.zeros(numel, dtype=dtype), precision)
    assert type(master) is cls
    return master


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_kept_exactly_and_rounded_for_the_model(kind: str) -> None:
    master = made(kind)
    new = values(30, master.dtype)
    master.write(5, 35, new)
    assert torch.equal(master.exact(5, 35), new)
    assert torch.equal(master.param[5:35], master.round(new).to(master.param.dtype))
    assert not master.exact(0, 5).any() and not master.exact(35).any(), "what lies beside it stays"


@pytest.mark.parametrize("kind", KINDS)
def test_stored_values_are_views_and_may_be_changed_before_they_are_written(kind: str) -> None:
    master = made(kind)
    master.write(0, 40, values(40, master.dtype))
    exact = master.exact()
    assert master.is_stored == (exact.data_ptr() in {master.stepped.data_ptr(), master.param.data_ptr()})
    master.write(0, 40, exact.mul_(3))
    assert torch.equal(master.exact(), values(40, master.dtype) * 3)
    assert torch.equal(master.param, master.round(master.exact()).to(master.param.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_what_completes_a_segment_comes_back_from_its_state(kind: str) -> None:
    master, other = made(kind), made(kind)
    master.write(0, 40, values(40, master.dtype))
    owner = ManagedParam("p", nn.Parameter(torch.empty(4, 3)), 0, 0, 0, Grain.MATRIX)
    segment = Segment(owner, 0, 20, 12, nn.Parameter(torch.empty(4, 3)), F32)
    entry = {**master.arrays(segment), "exp_avg": torch.ones(4, 3)}
    assert set(entry) - {"exp_avg"} == ({master.name} if master.completes else set())
    if master.completes:
        assert master.name in MASTER_NAMES
        exact = exact_param(entry, segment.view_in(master.param))
        assert exact is not None and torch.equal(exact.flatten(), master.exact(*segment.range))
    other.param.copy_(master.param)
    other.take(segment, entry)
    assert set(entry) == {"exp_avg"}
    assert torch.equal(other.exact(*segment.range), master.exact(*segment.range))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_float32_master_follows_what_was_written_and_nothing_else(dtype: torch.dtype) -> None:
    master = make_master(torch.zeros(40, dtype=dtype), Precision(dtype))
    new = values(40)
    master.write(0, 40, new)
    master.param[::2] = new[::2].to(dtype)  # whichever way something has rounded the exact values, they stay
    master.param[7], master.param[8] = 5.0, -5.0
    master.follow_writes([])
    expected = new.clone()
    expected[7], expected[8] = 5.0, -5.0
    assert torch.equal(master.exact(), expected)


def test_what_is_ahead_of_the_model_begins_anew_where_that_was_written_and_nowhere_else() -> None:
    master = make_master(torch.zeros(40), Precision(parameter_compression="int8"))
    master.stepped.copy_(values(40))
    owner = ManagedParam("p", nn.Parameter(torch.empty(12)), 0, 0, 0)
    master.param.fill_(5.0)
    master.follow_writes([Segment(owner, 0, 20, 12, owner.param, F32)])
    expected = values(40)
    expected[20:32] = 5.0
    assert torch.equal(master.exact(), expected)


@pytest.mark.parametrize("kind", [kind for kind, (_, _, cls) in KINDS.items() if cls is not Remainder])
def test_parameters_follow_what_an_optimizer_steps(kind: str) -> None:
    master = made(kind)
    master.stepped.copy_(values(40))
    master.round_stepped()
    assert torch.equal(master.exact(), values(40).to(master.dtype))
    assert torch.equal(master.param, master.round(master.exact()).to(master.param.dtype))
