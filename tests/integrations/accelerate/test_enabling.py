"""`enable` refuses what it cannot serve, and changes nothing then."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from follow import layers
from worker_pool import RunOnRanks

import zeroopt

pytest.importorskip("accelerate")

from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, DistributedType
from accelerators import accelerator

from zeroopt.integrations.accelerate import enable


def sgd(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA]
)
def test_other_ways_to_split_the_state_are_refused(kind: DistributedType) -> None:
    with accelerator() as acc:
        acc.state.distributed_type = kind
        with pytest.raises(zeroopt.NotSupportedError, match=f"set up for {kind.value}"):
            enable(acc)
        assert type(acc) is Accelerator


def test_model_parallelism_is_refused() -> None:
    with accelerator() as acc:
        acc.state.parallelism_config = ParallelismConfig(tp_size=2)
        with pytest.raises(zeroopt.NotSupportedError, match="tp_size=2"):
            enable(acc)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_accelerate_does_not_know_of_are_refused(name: str) -> None:
    several = patch.dict(os.environ, {name: "2"})
    with accelerator() as acc, several, pytest.raises(zeroopt.StateError, match=r"2 processes were started.*cpu=True"):
        enable(acc)


def test_options_are_those_of_wrap() -> None:
    with accelerator() as acc:
        with pytest.raises(zeroopt.ConfigError, match=r"got 'zero_stage'; it has average_every, .*, wire"):
            enable(acc, zero_stage=1)
        with pytest.raises(zeroopt.ConfigError, match=r"expected an accelerate\.Accelerator, got Linear"):
            enable(torch.nn.Linear(1, 1))
        assert type(acc) is Accelerator


def test_in_time_and_once() -> None:
    with accelerator() as acc:
        net = layers()
        evaluated = acc.prepare_model(net, evaluation_mode=True)
        assert enable(acc, stage=1) is acc
        acc.prepare(net, sgd(net))
        assert acc._models != [evaluated]
        assert enable(acc, stage=1) is acc
        with pytest.raises(zeroopt.StateError, match="has prepared a model or an optimizer already"):
            enable(acc, stage=2)
        assert acc.zeroopt_options["stage"] == 1
        acc.free_memory()
        enable(acc, stage=2)
        assert acc.zeroopt_options["stage"] == 2


def too_late() -> None:
    with accelerator() as acc:
        acc.prepare(layers())
        with pytest.raises(zeroopt.StateError, match="already"):
            enable(acc)


def test_behind_ddp_it_is_too_late(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, too_late)


def hooked(hook: DDPCommunicationHookType) -> Any:
    return DistributedDataParallelKwargs(comm_hook=hook)


def test_hooks_of_ddp() -> None:
    with accelerator(kwargs_handlers=[hooked(DDPCommunicationHookType.BF16)]) as acc:
        assert enable(acc).zeroopt_options["reduce_dtype"] is torch.bfloat16
        assert enable(acc, reduce_dtype=None).zeroopt_options["reduce_dtype"] is None
    refused = pytest.raises(zeroopt.NotSupportedError, match="communication hook power_sgd")
    with accelerator(kwargs_handlers=[hooked(DDPCommunicationHookType.POWER_SGD)]) as acc, refused:
        enable(acc)


@pytest.mark.slow
def test_without_accelerate_its_name_is_told() -> None:
    code = "import sys; sys.modules['accelerate'] = None; import zeroopt.integrations; import zeroopt.integrations.accelerate"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert (
        "ImportError: zeroopt.integrations.accelerate needs accelerate (tried with 1.15.0): pip install accelerate"
        in done.stderr
    )
