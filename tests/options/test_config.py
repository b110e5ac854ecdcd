"""Options that are good by themselves; which of them ranks, and optimizers of one model, have to have in common."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from lone_slice import config_with

from zeroopt import ConfigError, NotSupportedError
from zeroopt.collectives import Wire
from zeroopt.collectives.lone import lone_group
from zeroopt.options.config import Config, check_param_dtypes
from zeroopt.options.placement import PLACEMENTS
from zeroopt.options.precision import Precision

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class OtherWire(Wire):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 3}, "expected stage to be one of 0, 1, 2, got 3"),
        ({"stage": True}, "expected stage to be one of 0, 1, 2, got True"),
        ({"fused": 1}, "expected fused to be one of True, False, 'auto', got 1"),
        ({"bucket_mb": 0}, "expected bucket_mb to be a positive number of MiB, or None, got 0"),
        ({"bucket_mb": float("inf")}, "expected bucket_mb to be a positive number of MiB, or None, got inf"),
        ({"bucket_mb": float("nan")}, "expected bucket_mb to be a positive number of MiB, or None, got nan"),
        ({"bucket_mb": True}, "expected bucket_mb to be a positive number of MiB, or None, got True"),
        ({"bucket_mb": "25"}, "expected bucket_mb to be a positive number of MiB, or None, got '25'"),
        ({"overlap": 1}, "expected overlap to be one of True, False, got 1"),
        ({"broadcast_buffers": None}, "expected broadcast_buffers to be one of True, False, got None"),
        ({"sync_module_states": 0}, "expected sync_module_states to be one of True, False, got 0"),
        ({"share_parameters": "no"}, "expected share_parameters to be one of True, False, got 'no'"),
        ({"step_in_backward": 1}, "expected step_in_backward to be one of True, False, got 1"),
        ({"step_in_backward": True, "stage": 1}, "step_in_backward=True needs stage 2, got stage=1"),
        ({"cast_inputs": 1}, "expected cast_inputs to be one of True, False, got 1"),
        ({"micro_batches": 3}, "expected micro_batches to be 1, 2, 4 or another power of two, or None, got 3"),
        ({"micro_batches": 0}, "expected micro_batches to be 1, 2, 4 or another power of two, or None, got 0"),
        ({"micro_batches": True}, "expected micro_batches to be 1, 2, 4 or another power of two, or None, got True"),
        ({"micro_batches": 2, "reduce_dtype": BF16}, "micro_batches sums in float32, and reduce_dtype=torch.bfloat16"),
        ({"bucket_buffers": 0}, "expected bucket_buffers to be a positive number of buffers, got 0"),
        ({"bucket_buffers": 2.0}, "expected bucket_buffers to be a positive number of buffers, got 2.0"),
        ({"bucket_buffers": True}, "expected bucket_buffers to be a positive number of buffers, got True"),
        ({"check_every": 0}, "expected check_every to be a positive number of steps or None, got 0"),
        ({"average_every": 1.5}, "expected average_every to be a positive number of steps or None, got 1.5"),
        (
            {"reduce_dtype": F64},
            "expected reduce_dtype to be one of None, torch.float32, torch.bfloat16, torch.float16",
        ),
        ({"wire": Wire(F64)}, "expected wire.dtype to be one of None, torch.float32"),
        ({"wire": Wire(), "reduce_dtype": BF16}, "expected reduce_dtype or wire, got both"),
        ({"max_grad_norm": 0}, "expected max_grad_norm to be a positive number or None, got 0"),
        ({"max_grad_norm": float("nan")}, "expected max_grad_norm to be a positive number or None, got nan"),
        ({"max_grad_norm": True}, "expected max_grad_norm to be a positive number or None, got True"),
        ({"max_grad_norm": torch.tensor(1.0)}, "expected max_grad_norm to be a positive number or None, got tensor"),
        (
            {"state_device": "cuda"},
            "expected state_device to be 'cpu', or None for the device of the parameters, got 'cuda'",
        ),
        (
            {"state_device": "disk"},
            "expected state_device to be 'cpu', or None for the device of the parameters, got 'disk'",
        ),
        ({"state_device": 1.5}, "expected state_device to be 'cpu', or None for the device of the parameters, got 1.5"),
        ({"share_parameters": True, "stage": 0}, "share_parameters=True needs stage 1 or 2"),
        ({"cast_inputs": True}, "cast_inputs=True casts to param_dtype, which is not given"),
        ({"average_group": lone_group()}, "average_group needs average_every"),
        ({"shard_group": 3}, "expected shard_group to be a torch.distributed.ProcessGroup that this rank is in, got 3"),
        ({"shard_group": lone_group(), "stage": 0}, "shard_group needs stage 1 or 2"),
        ({"shard_group": lone_group()}, "shard_group has one rank, which would hold everything"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_values_that_no_release_would_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_with(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "options",
    [{"wire": Wire()}, {"average_every": 2}, {"step_in_backward": True}, {"gradient_compression": "int8"}],
    ids=lambda value: next(iter(value)),
)
def test_what_depends_on_the_number_of_ranks_does_not_go_with_micro_batches(options: dict[str, Any]) -> None:
    with pytest.raises(NotSupportedError, match=f"micro_batches promises the same bits.* {next(iter(options))}="):
        config_with(micro_batches=2, **options)


@pytest.mark.parametrize("options", [{"reduce_dtype": BF16}, {"wire": Wire()}], ids=lambda value: next(iter(value)))
def test_what_stage_0_cannot_do_yet(options: dict[str, Any]) -> None:
    with pytest.raises(NotSupportedError, match="is supported in stages 1 and 2; leave it at None in stage 0"):
        config_with(stage=0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"stage": stage, "fused": fused} for stage in PLACEMENTS for fused in (True, False, "auto")
    ]
    + [
        {"max_grad_norm": float("inf")},
        {"cast_inputs": True, "precision": Precision(BF16)},
        {"average_every": 1, "average_group": lone_group()},
        {"share_parameters": True, "stage": 1},
        {"wire": Wire(F16), "stage": 1},
    ],
    ids=lambda value: ", ".join(value),
)  # fmt: skip
def test_good_options(options: dict[str, Any]) -> None:
    config = config_with(**options)
    assert config.placement is PLACEMENTS[config.stage]
    with pytest.raises(FrozenInstanceError):
        config.stage = 1  # type: ignore[misc]


@pytest.mark.parametrize("stage", PLACEMENTS)
def test_state_may_be_kept_elsewhere(stage: int) -> None:
    config = config_with(stage=stage, state_device="cpu")
    assert config.placement == replace(PLACEMENTS[stage], home=torch.device("cpu"))
    assert config == config_with(stage=stage, state_device=torch.device("cpu"))


def test_numbers_read_alike_whatever_their_type() -> None:
    one, other = config_with(bucket_mb=25, max_grad_norm=1), config_with(bucket_mb=25.0, max_grad_norm=1.0)
    assert one.describe() == other.describe()
    assert one == other


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, None), ({"reduce_dtype": F16}, F16), ({"wire": Wire()}, None), ({"wire": Wire(BF16)}, BF16)],
)
def test_in_what_gradients_travel(options: dict[str, Any], dtype: torch.dtype | None) -> None:
    assert config_with(**options).wire_dtype is dtype


def test_ranks_compare_all_options_but_groups() -> None:
    lines = config_with(average_every=2).describe()
    named = [line.removeprefix("option ").partition("=")[0] for line in lines[:-2]]
    assert named == sorted(
        field.name for field in fields(Config) if field.name not in ("norm_group", "average_group", "shard_group")
    )
    assert "option average_every=2" in lines and "option transport='auto'" in lines
    assert lines[-2:] == ["option shard_group is None", "option norm_group is None"]
    with_groups = config_with(average_every=2, norm_group=lone_group(), average_group=lone_group())
    assert with_groups.describe() == [*lines[:-1], "option norm_group is not None"]


CHANGED: dict[str, Any] = {
    "stage": 1,
    "bucket_mb": 1.0,
    "transport": "shm",
    "overlap": False,
    "broadcast_buffers": False,
    "sync_module_states": False,
    "share_parameters": True,
    "reduce_dtype": BF16,
    "wire": Wire(),
    "bucket_buffers": 1,
    "check_every": 1,
    "max_grad_norm": 1.0,
    "average_every": 1,
}


@pytest.mark.parametrize("name", CHANGED)
def test_further_optimizers_of_a_model_have_the_options_of_its_first(name: str) -> None:
    first, second = config_with(), config_with(**{name: CHANGED[name]})
    with pytest.raises(ConfigError) as caught:
        second.check_shares(first)
    assert str(caught.value).startswith(
        f"the model was wrapped with {name}={getattr(first, name)!r} for its first optimizer, and is now wrapped with "
        f"{name}={getattr(second, name)!r}; "
    )
    assert second.describe() != first.describe()
    second.check_shares(second)


def test_what_further_optimizers_may_have_of_their_own() -> None:
    first = config_with(precision=Precision(BF16), cast_inputs=True)
    config_with(fused=False).check_shares(first)
    config_with(precision=Precision(BF16, "remainder"), cast_inputs=True).check_shares(first)
    with pytest.raises(ConfigError, match="cast_inputs=True for its first optimizer"):
        config_with(precision=Precision(BF16)).check_shares(first)


def test_wires_and_transports_are_compared_as_ranks_compare_them() -> None:
    first = config_with(wire=Wire(BF16))
    config_with(wire=Wire(BF16)).check_shares(first)
    for other in (Wire(), Wire(F16), OtherWire(BF16)):
        with pytest.raises(ConfigError, match="the model was wrapped with wire="):
            config_with(wire=other).check_shares(first)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_parameters_that_param_dtype_takes(dtype: torch.dtype) -> None:
    check_param_dtypes(config_with(precision=Precision(BF16)), {"w": dtype})


@pytest.mark.parametrize("dtype", [F64, F16])
def test_parameters_that_param_dtype_does_not_take(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError) as caught:
        check_param_dtypes(config_with(precision=Precision(BF16)), {"a": F32, "w": dtype})
    assert str(caught.value) == (
        f"param_dtype=torch.bfloat16: expected parameters of torch.float32 or torch.bfloat16, got 'w' of {dtype}"
    )


@pytest.mark.parametrize(
    ("reduce_dtype", "stored", "fits"),
    [
        (None, F64, True),
        (F32, F32, True),
        (BF16, F32, True),
        (F16, F32, True),
        (F32, BF16, True),
        (F16, F16, True),
        (F16, BF16, False),
        (BF16, F16, False),
        (F32, F64, False),
        (BF16, F64, False),
    ],
)
@pytest.mark.parametrize("as_wire", [False, True])
def test_gradients_travel_between_32_and_16_bits(
    reduce_dtype: torch.dtype | None, stored: torch.dtype, fits: bool, as_wire: bool
) -> None:
    config = config_with(wire=Wire(reduce_dtype)) if as_wire else config_with(reduce_dtype=reduce_dtype)
    if fits:
        check_param_dtypes(config, {"w": stored})
        return
    with pytest.raises(ConfigError) as caught:
        check_param_dtypes(config, {"w": stored})
    name = "wire.dtype" if as_wire else "reduce_dtype"
    assert str(caught.value) == f"{name}={reduce_dtype} does not fit parameters of {stored}: leave it at None"


def test_gradients_of_cast_parameters_are_those_of_the_cast() -> None:
    check_param_dtypes(config_with(precision=Precision(BF16), reduce_dtype=F32), {"w": F32})
    with pytest.raises(ConfigError, match=r"reduce_dtype=torch.float16 does not fit parameters of torch.bfloat16"):
        check_param_dtypes(config_with(precision=Precision(BF16), reduce_dtype=F16), {"w": F32})
