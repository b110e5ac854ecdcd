"""A build without CUDA kernels trains on CUDA devices by torch's operations and the optimizer's own step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from without_kernels import built_without_cuda
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import ops

from .process import PretendProcess
from .training import Loop, train

pytestmark = pytest.mark.slow

OWN_STEP: dict[str, Any] = {"fused": False}  # on the CPU, which has kernels
LOOPS = {
    "stage 0": Loop({"stage": 0}),
    "stage 1, accumulated": Loop({"stage": 1}, accumulate=2),
    "stage 2": Loop({"stage": 2}),
    "stage 2, no_sync": Loop({"stage": 2}, accumulate=2, no_sync=True),
    "stage 2, max_grad_norm": Loop({"stage": 2, "max_grad_norm": 0.1}),
    "stage 2, GradScaler and clipping": Loop({"stage": 2}, scaler=True, clip=0.1),
    "stage 2, bfloat16": Loop({"stage": 2, "param_dtype": torch.bfloat16}),
    "stage 1, reduce_dtype": Loop({"stage": 1, "reduce_dtype": torch.bfloat16}, accumulate=2),
    "stage 2, step in backward": Loop({"stage": 2, "step_in_backward": True}),
}


def _train_here(loop: Loop) -> dict[str, Any]:
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> list[torch.Tensor]:
        return train(loop, rank.number, rank.device, rank.recorded)

    with built_without_cuda() as messages:
        params, recording = on_ranks(2, run)
    return {
        "params": params,
        "races": [str(race) for race in recording.races()],
        "wrong orders": recording.wrong_orders(range(5)),
        "messages": messages,
    }


def _train_on_cpu(loop: Loop) -> list[torch.Tensor]:
    return train(
        Loop(**{**vars(loop), "options": {**loop.options, **OWN_STEP}}),
        torch.distributed.get_rank(),
        torch.device("cpu"),
    )


@pytest.mark.parametrize("name", LOOPS)
def test_trains_as_by_the_own_step_on_the_cpu(
    name: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks
) -> None:
    expected = run_on_ranks(2, _train_on_cpu, LOOPS[name])
    result = on_pretend_cuda(_train_here, LOOPS[name])
    assert result["races"] == []
    assert result["wrong orders"] == {}
    for params in result["params"]:
        for param, other in zip(params, expected[0], strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0)
    (message,) = result["messages"]
    assert message.startswith("what runs on cuda:0 goes by torch's operations and the optimizer's own step")
    assert "zeroopt was built without CUDA: reinstall it" in message


def _refusals() -> list[str]:
    """What wrap and the kernels themselves say to what only a kernel can do."""
    loops = [
        Loop({"fused": True}),
        Loop({"state_dtype": torch.int8}),
        Loop({"param_dtype": torch.bfloat16, "master_weights": "remainder"}),
        Loop(optimizer=zeroopt.optim.FusedAdamW),
    ]
    found = []
    with built_without_cuda():
        for loop in loops:
            with pytest.raises(zeroopt.KernelUnavailableError) as error:
                loop.wrap(torch.device("cuda"))
            found.append(str(error.value).partition(":")[0])
        values, codes = torch.zeros(4, device="cuda"), torch.zeros(4, dtype=torch.int8, device="cuda")
        with pytest.raises(zeroopt.KernelUnavailableError) as error:
            ops.quantize(values, codes, torch.zeros(1, device="cuda"))
        found.append(str(error.value).partition(":")[0])
    return found


def test_what_only_a_kernel_can_do_is_refused(on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_refusals) == [
        "fused=True needs a fused kernel, and there is none for cuda",
        "state_dtype=torch.int8 needs a fused kernel, and there is none for cuda",
        "master_weights='remainder' needs a fused kernel, and there is none for cuda",
        "FusedAdamW steps by a fused kernel, and there is none for cuda",
        "there is no kernel for tensors on cuda",
    ]


def _move(device: str) -> list[torch.Tensor]:
    """What moves data, on a device."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(1000, generator=generator).to(device)
    slices = [torch.randn(1000, generator=generator).bfloat16().to(device) for _ in range(5)]
    packed, several, total = (
        torch.zeros(1000, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    )
    ops.pack(source, packed, scale=1 / 3)
    ops.pack_segments([source[:400], source[400:]], [several[:400], several[400:]], scale=0.7)
    ops.reduce(slices, total, base=source)
    return [result.cpu() for result in (packed, several, total)]


def _move_here() -> list[torch.Tensor]:
    with built_without_cuda():
        return _move("cuda")


def test_the_same_bits_as_by_kernels(on_pretend_cuda: PretendProcess) -> None:
    for without, by_kernel in zip(on_pretend_cuda(_move_here), _move("cpu"), strict=True):
        assert torch.equal(without, by_kernel) and without.any()
