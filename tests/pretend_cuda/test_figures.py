"""What a step tells a device, in numbers: the host waits for nothing, and what it uploads does not depend on the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from .process import PretendProcess
from .test_training import LOOPS
from .training import Loop, Trainer, train

pytestmark = pytest.mark.slow

HOST_WAITS = {"stage 2, GradScaler": 1, "stage 2, GradScaler and clipping": 1}  # for what ranks agree on; else 0
OF_THE_USER = ("zeroopt/module.py", "zeroopt/parameters/arriving.py")  # forward, and what is done to parameters
CLIPPING = {
    "zeroopt::squared_norms": 1,
    "aten::zero_": 1,
    "aten::sqrt.out": 1,
    "aten::cat.out": 1,
    "aten::linalg_vector_norm.out": 1,
    "aten::pow.Tensor_Scalar_out": 2,
    "aten::sum.IntList_out": 1,
    "aten::add.out": 1,
    "aten::reciprocal.out": 1,
    "aten::mul.out": 1,
    "aten::clamp.out": 1,
    "aten::copy_": 3,
}
STEADY = [name for name, loop in LOOPS.items() if not loop.side and loop.options.get("fused", True)]


def _figures_of(loop: Loop) -> dict[str, Any]:
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> int:
        train(loop, rank.number, rank.device_for(loop), rank.recorded)
        return rank.device_for(loop).index

    devices, recording = on_ranks(2, run)
    return vars(recording.figures(devices[0]))


@pytest.mark.parametrize("name", STEADY)
def test_the_host_waits_for_nothing_in_a_step(name: str, on_pretend_cuda: PretendProcess) -> None:
    host_waits = on_pretend_cuda(_figures_of, LOOPS[name])["host_waits"]
    assert sum(host_waits.values()) == HOST_WAITS.get(name, 0), host_waits


def _launched_by_zeroopt(loop: Loop) -> tuple[dict[str, int], dict[str, Any]]:
    """What a step launches besides the model's own operators and those of the user, by name; and its figures."""
    import _device

    from .ranks import on_ranks

    _, recording = on_ranks(2, lambda rank: train(loop, rank.number, rank.device, rank.recorded))
    launched = Counter(
        node.name
        for node in recording.nodes
        if node.kind == _device.Kind.LAUNCH
        and recording.actors[node.actor].endswith("cuda:0")
        and "zeroopt/" in node.where
        and not any(file in node.where for file in OF_THE_USER)
    )
    return dict(launched), vars(recording.figures(0))


@pytest.mark.parametrize("depth", [6, 148, 998], ids=lambda depth: f"{2 * depth + 5} parameters")
@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("clips", [False, True], ids=["", "max_grad_norm"])
def test_launches_go_by_buckets_alone(depth: int, stage: int, clips: bool, on_pretend_cuda: PretendProcess) -> None:
    if clips and (stage == 0 or depth == 998):
        pytest.skip("in stage 0 every gradient has a norm of its own; large models take long")
    options = {"stage": stage, "bucket_mb": 0.02, **({"max_grad_norm": 0.1} if clips else {})}
    launched, figures = on_pretend_cuda(_launched_by_zeroopt, Loop(options, depth=depth))
    num_buckets = figures["collectives"]["reduce_scatter"]
    assert num_buckets == {6: 1, 148: 3, 998: 19}[depth]
    packed = {"zeroopt::pack_segments": num_buckets, "zeroopt::step": 1, "aten::copy_": 1}
    if stage == 2:
        packed["aten::zero_"] = num_buckets  # gaps between parameters of 8 elements
    assert launched == (Counter(packed) + Counter(CLIPPING) if clips else packed)
    assert figures["host_waits"] == {}
    assert figures["uploads"] == 1  # which parameters had gradients
    # Activations, and gradients until their bucket is packed: the allocator gives 512 bytes to each, however small.
    assert figures["peak_bytes"] <= {6: 12_288, 148: 110_592, 998: 557_056}[depth]
    assert figures["collectives"] == {
        "reduce_scatter": num_buckets,
        "all_gather": num_buckets + clips,
        "all_reduce": 1,
    }


def _count_another_step() -> list[str]:
    from zeroopt.errors import CollectiveError

    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> list[str]:
        trainer = Trainer(Loop({"stage": 2}, warm_up=1, steps=3), rank.number, rank.device)
        trainer.step()
        trainer.optimizer.replica.reducer.num_steps += rank.number  # as if one rank had taken one more
        seen = []
        for _ in range(2):
            try:
                trainer.step()
                seen.append("")
            except CollectiveError as error:
                seen.append(str(error))
        return seen

    return on_ranks(2, run)[0][0]


def test_ranks_that_diverge_hear_of_it_one_backward_later(on_pretend_cuda: PretendProcess) -> None:
    first, second = on_pretend_cuda(_count_another_step)
    assert first == ""
    assert "the ranks have diverged" in second
