"""What 8-bit moments and completed parameters stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroopt import ops
from zeroopt.options.precision import split_master
from zeroopt.plan.regions import FlatLayout
from zeroopt.state.shard_tensor import ShardTensor
from zeroopt.state.tiers import decode, decoded, is_coded
from zeroopt.storage.masters import exact_param


def coded(numel: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the values that they stand for."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    codes, scales = torch.empty(numel, dtype=torch.int8), torch.empty(ops.num_blocks(numel))
    ops.quantize(values, codes, scales)
    ops.dequantize(codes, scales, values)
    return codes, scales, values


@given(st.integers(1, 1500), st.data())
def test_any_range_decodes_alike(numel: int, data: st.DataObject) -> None:
    codes, scales, values = coded(numel)
    begin = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(begin, numel))
    assert torch.equal(decode(codes, scales, begin, end), values[begin:end])
    assert torch.equal(decode(codes, scales), values)


def test_entries_lose_codes_and_nothing_else() -> None:
    codes, scales, values = coded(600)
    step, other = torch.tensor(3.0), torch.zeros(4)
    layout = FlatLayout.of([2, 600], [600, 1])
    transposed = codes.view(20, 30).t()
    entry = {
        "step": step,
        "exp_avg": transposed,
        "exp_avg_scale": scales,
        "exp_avg_sq": ShardTensor(layout, 512, codes),
        "exp_avg_sq_scale": ShardTensor(FlatLayout.of([5], [1]), 2, scales),
        "my_scale": other,  # an optimizer's own
    }
    assert is_coded("exp_avg", entry) and is_coded("exp_avg_sq", entry)
    assert not any(is_coded(name, entry) for name in ("step", "my", "my_scale", "exp_avg_scale", "no such"))
    plain = decoded(entry)
    assert list(plain) == ["step", "exp_avg", "exp_avg_sq", "my_scale"]
    assert plain["step"] is step and plain["my_scale"] is other
    assert torch.equal(plain["exp_avg"], values.view(20, 30).t()) and plain["exp_avg"].stride() == (1, 30)
    shard = plain["exp_avg_sq"]
    assert isinstance(shard, ShardTensor) and (shard.start, shard.shape) == (512, (2, 600))
    assert torch.equal(shard.local, values)


def test_plain_values_with_scales_stay() -> None:
    """As in a whole state dict, where scales only say what the codes were."""
    values, scales = torch.ones(300), torch.ones(2)
    entry = {"exp_avg": values, "exp_avg_scale": scales}
    assert not is_coded("exp_avg", entry)
    assert decoded(entry) == {"exp_avg": values}


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_exact_parameters(shape: tuple[int, ...]) -> None:
    exact = torch.randn(12, generator=torch.Generator().manual_seed(0)).view(shape)
    rounded, remainder = split_master(exact)
    found = exact_param({"remainder": remainder.flatten()}, rounded)
    assert found is not None and torch.equal(found, exact)
    found = exact_param({"remainder": remainder.flatten()}, rounded.float())  # taken over into float32 parameters
    assert found is not None and torch.equal(found, exact)
    assert exact_param({"master_param": exact}, rounded) is exact
    assert exact_param({"exp_avg": exact}, rounded) is None
