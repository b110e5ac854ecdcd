"""Whole trainings on a GPU, over the backend's collectives: against DDP there, against the CPU, and with collectives held up.

NCCL refuses two ranks on one GPU, so there two ranks go over Gloo, and NCCL has one rank, through the same transport. On the CPU
the same runs over Gloo, so that what is written here has run before it meets a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import batch, build, loss_of, optimizer_for, snapshot
from without_kernels import built_without_cuda
from worker_pool import RunOnRanks

import zeroopt
from bench.gpu.methods import sums_here, sums_in_levels, sums_of_backend
from zeroopt.collectives import Transport, TransportFactory, registered, torch_native
from zeroopt.collectives.comm_stream import StreamCollective
from zeroopt.collectives.hierarchy import HierarchyTransport
from zeroopt.collectives.registered_memory import allocating_backend

STAGES = (0, 1, 2)
STEPS = 4
WARM_UP = 3  # steps before a graph is captured
BUCKET_MB = 0.005  # several buckets a model
SLEEP_CYCLES = 1_000_000  # half a millisecond or more
BF16, F16, INT8 = torch.bfloat16, torch.float16, torch.int8


class Place(NamedTuple):
    """Where ranks train. `dist.new_group` makes a group of that backend for them."""

    device: str
    backend: str
    ranks: int

    def enter(self) -> tuple[torch.device, dist.ProcessGroup]:
        """This rank's device, which becomes the current one, and its group. Collective."""
        if self.device == "cpu":
            return torch.device("cpu"), dist.group.WORLD
        device = torch.device("cuda", dist.get_rank() if self.backend == "nccl" else 0)
        torch.cuda.set_device(device)
        return device, dist.group.WORLD if self.backend == "gloo" else dist.new_group(backend=self.backend)


def on_gpus(number: int) -> list[pytest.MarkDecorator]:
    there = torch.cuda.device_count()
    return [
        pytest.mark.cuda,
        pytest.mark.skipif(there < number, reason=f"needs {number} CUDA devices, there are {there}"),
    ]


ON_CPU = pytest.param(Place("cpu", "gloo", 2), id="CPU")
ONE_RANK = pytest.param(Place("cuda", "nccl", 1), id="one rank on NCCL", marks=on_gpus(1))
ONE_GPU = pytest.param(Place("cuda", "gloo", 2), id="two ranks on one GPU", marks=on_gpus(1))
TWO_GPUS = pytest.param(Place("cuda", "nccl", 2), id="two GPUs", marks=on_gpus(2))

each_place = pytest.mark.parametrize("place", [ON_CPU, ONE_RANK, ONE_GPU, TWO_GPUS])


@contextmanager
def exact() -> Iterator[None]:
    """The same bits whenever a kernel runs on the same numbers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def held_up(device: torch.device) -> Iterator[None]:
    """Its streams are busy for a while before and after each collective: who does not wait for it reads too early."""

    def delayed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            pause(device)
            work = function(*args, **kwargs)
            pause(device)
            return work

        return run

    levels: Any = sys.modules[HierarchyTransport.__module__]  # the package has a function of that name
    with (
        patch.object(torch_native, "reduce_scatter_flat", delayed(torch_native.reduce_scatter_flat)),
        patch.object(torch_native, "all_gather_flat", delayed(torch_native.all_gather_flat)),
        patch.object(levels, "all_gather_flat", delayed(levels.all_gather_flat)),
        patch.object(dist, "all_to_all_single", delayed(dist.all_to_all_single)),
    ):
        yield


def pause(device: torch.device) -> None:
    """On the current stream."""
    if device.type == "cuda":
        torch.cuda._sleep(SLEEP_CYCLES)
    else:
        time.sleep(1e-4)


# Against DDP, on the same device.


def train_by_ddp_and_stages(place: Place, model_name: str, optimizer_name: str) -> list[list[list[Tensor]]]:
    """Parameters after each step: DDP's, then those of all stages."""
    device, group = place.enter()

    def train(stage: int | None) -> list[list[Tensor]]:
        net = build(model_name).to(device)
        optimizer = optimizer_for(optimizer_name, net)
        if stage is None:
            model: nn.Module = DistributedDataParallel(net, process_group=group)
        else:
            options = {"process_group": group, "transport": sums_here, "bucket_mb": BUCKET_MB, "fused": False}
            model, optimizer = zeroopt.wrap(net, optimizer, stage=stage, **options)
        history = []
        for step in range(STEPS):
            loss_of(model(batch(model_name, step).to(device))).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append([value.cpu() for value in snapshot(net)])
        return history

    with exact():
        return [train(stage) for stage in (None, *STAGES)]


@each_place
@pytest.mark.parametrize(("model_name", "optimizer_name"), [("mlp", "adamw"), ("lm", "sgd_momentum")])
def test_stages_follow_ddp(run_on_ranks: RunOnRanks, place: Place, model_name: str, optimizer_name: str) -> None:
    for ddp, *stages in run_on_ranks(place.ranks, train_by_ddp_and_stages, place, model_name, optimizer_name):
        for stage, history in zip(STAGES, stages, strict=True):
            for step, (expected, got) in enumerate(zip(ddp, history, strict=True)):
                assert all(map(torch.equal, expected, got)), f"stage {stage}, step {step}"


# Against the CPU, bit for bit: nothing is computed but element by element.


class Elementwise(nn.Module):
    """How far parameters of many sizes are from their targets."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        numels = (1, 77, 300, 1025, 4096)
        self.values = nn.ParameterList(torch.randn(numel, generator=generator) for numel in numels)

    def forward(self, targets: Tensor) -> Tensor:
        parts = targets.split([value.numel() for value in self.values])
        return torch.stack([(v - part).square().sum() for v, part in zip(self.values, parts, strict=True)]).sum()

    def targets(self, step: int) -> Tensor:
        """This rank's, for a step."""
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        return torch.randn(sum(value.numel() for value in self.values), generator=generator)


TIERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 gradients": {"reduce_dtype": BF16},
    "bfloat16 moments": {"state_dtype": BF16},
    "8-bit moments": {"state_dtype": INT8},
    "bfloat16": {"param_dtype": BF16},
    "float16": {"param_dtype": F16},
    "remainder": {"param_dtype": BF16, "master_weights": "remainder"},
    "remainder, 8-bit moments": {"param_dtype": BF16, "master_weights": "remainder", "state_dtype": INT8},
    "no master": {"param_dtype": BF16, "master_weights": "none"},
    "state in host memory": {"state_device": "cpu"},
    "averaged": {"average_every": 2},
}


def train_elementwise(
    options: dict[str, Any], transport: TransportFactory, device: torch.device, group: dist.ProcessGroup
) -> list[Tensor]:
    """Parameters as the model has them, and as exactly as they are kept."""
    net = Elementwise().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    options = {"process_group": group, "transport": transport, "bucket_mb": BUCKET_MB, "fused": True, **options}
    model, optimizer = zeroopt.wrap(net, optimizer, **options)
    for step in range(STEPS):
        model(net.targets(step).to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    exactly = [optimizer.full_parameter(param) for param in net.parameters()]
    return [value.detach().cpu() for value in (*net.parameters(), *exactly)]


def train_in_three_ways(place: Place, options: dict[str, Any], transport: TransportFactory) -> tuple[list[Tensor], ...]:
    """On the CPU, on the device, and there with collectives held up."""
    device, group = place.enter()
    on_cpu = train_elementwise(options, transport, torch.device("cpu"), dist.group.WORLD)
    there = train_elementwise(options, transport, device, group)
    with held_up(device):
        return on_cpu, there, train_elementwise(options, transport, device, group)


@each_place
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tier", TIERS)
def test_kernels_train_to_the_bits_of_the_cpu(run_on_ranks: RunOnRanks, place: Place, tier: str, stage: int) -> None:
    if stage == 0 and tier == "bfloat16 gradients":
        pytest.skip("a stage that shards nothing sends gradients as they are")
    options = {"stage": stage, **TIERS[tier]}
    for transport in (sums_here, sums_of_backend):
        for on_cpu, there, late in run_on_ranks(place.ranks, train_in_three_ways, place, options, transport):
            assert all(map(torch.equal, on_cpu, there)), transport.__name__
            assert all(map(torch.equal, there, late)), f"{transport.__name__}: somebody has not waited for a collective"


@pytest.mark.parametrize("place", [ON_CPU, ONE_RANK, TWO_GPUS])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tier", ["float32", "bfloat16"])
def test_levels_train_to_the_bits_of_the_cpu(run_on_ranks: RunOnRanks, place: Place, tier: str, stage: int) -> None:
    options = {"stage": stage, **TIERS[tier]}
    for on_cpu, there, late in run_on_ranks(place.ranks, train_in_three_ways, place, options, sums_in_levels):
        assert all(map(torch.equal, on_cpu, there))
        assert all(map(torch.equal, there, late)), "somebody has not waited for a collective"


def sums_in_registered_memory(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """`registered` on one host, with one rank, too."""
    transport = sums_here(group, device)
    if device.type != "cpu":
        transport.allocator = allocating_backend(group, device)  # type: ignore[attr-defined]
    return transport


def train_registered(
    place: Place, options: dict[str, Any], transport: TransportFactory
) -> tuple[list[Tensor], list[Tensor]]:
    """In memory of torch's allocator, and in the backend's."""
    device, group = place.enter()
    return train_elementwise(options, sums_here, device, group), train_elementwise(options, transport, device, group)


@pytest.mark.parametrize(
    ("place", "transport"),
    [
        pytest.param(*ONE_RANK.values, sums_in_registered_memory, id="one rank on NCCL", marks=ONE_RANK.marks),
        pytest.param(*TWO_GPUS.values, registered, id="two GPUs", marks=TWO_GPUS.marks),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_registered_memory_changes_no_bit(
    run_on_ranks: RunOnRanks, place: Place, stage: int, transport: TransportFactory
) -> None:
    options = {"stage": stage, "param_dtype": BF16}
    for plain, in_registered in run_on_ranks(place.ranks, train_registered, place, options, transport):
        assert all(map(torch.equal, plain, in_registered))


def train_by_graph(
    stage: int, is_captured: bool, transport: TransportFactory, device: torch.device, group: dist.ProcessGroup
) -> list[Tensor]:
    """Parameters after `WARM_UP` steps and `STEPS` more, which are a graph's replays if it is captured."""
    net = Elementwise().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    model, optimizer = zeroopt.wrap(
        net, optimizer, process_group=group, transport=transport, bucket_mb=BUCKET_MB, fused=True, stage=stage
    )
    targets, side = net.targets(0).to(device), torch.cuda.Stream(device)

    def step() -> None:
        model(targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(WARM_UP):
            targets.copy_(net.targets(number))
            step()
    torch.cuda.current_stream().wait_stream(side)
    run = step
    for number in range(WARM_UP, WARM_UP + STEPS):
        targets.copy_(net.targets(number))
        if is_captured and run is step:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog has a thread of its own
                step()
            run = graph.replay
        run()
    torch.cuda.synchronize()
    return [param.detach().cpu() for param in net.parameters()]


def train_eagerly_and_by_graph(place: Place, stage: int, transport: TransportFactory) -> tuple[list[Tensor], ...]:
    device, group = place.enter()
    return tuple(train_by_graph(stage, is_captured, transport, device, group) for is_captured in (False, True))


@pytest.mark.parametrize("place", [ONE_RANK, TWO_GPUS])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("transport", [sums_here, sums_of_backend, sums_in_levels])
def test_replays_of_a_graph_are_steps(
    run_on_ranks: RunOnRanks, place: Place, stage: int, transport: TransportFactory
) -> None:
    for eager, replayed in run_on_ranks(place.ranks, train_eagerly_and_by_graph, place, stage, transport):
        assert all(map(torch.equal, eager, replayed))


def train_without_kernels(
    stage: int, options: dict[str, Any], device: torch.device, group: dist.ProcessGroup
) -> list[Tensor]:
    """By torch's operations and the optimizer's own step."""
    with built_without_cuda():
        return train_elementwise({"stage": stage, "fused": "auto", **options}, sums_here, device, group)


def train_without_kernels_in_both_places(
    place: Place, stage: int, options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    device, group = place.enter()
    on_cpu = train_without_kernels(stage, {"fused": False, **options}, torch.device("cpu"), dist.group.WORLD)
    return on_cpu, train_without_kernels(stage, options, device, group)


@pytest.mark.parametrize("place", [ONE_RANK, ONE_GPU, TWO_GPUS])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tier", ["float32", "bfloat16"])
def test_a_build_without_cuda_trains_by_torchs_operations(
    run_on_ranks: RunOnRanks, place: Place, tier: str, stage: int
) -> None:
    """CUDA's division and root may round otherwise than the CPU's."""
    for on_cpu, there in run_on_ranks(place.ranks, train_without_kernels_in_both_places, place, stage, TIERS[tier]):
        torch.testing.assert_close(there, on_cpu)


def train_without_a_wait(place: Place) -> tuple[list[Tensor], list[Tensor]]:
    """As it should be, and where nobody waits for collectives that are held up."""
    device, group = place.enter()
    right = train_elementwise({"stage": 2}, sums_here, device, group)
    with held_up(device), patch.object(StreamCollective, "finish", lambda self: None):
        return right, train_elementwise({"stage": 2}, sums_here, device, group)


@pytest.mark.parametrize("place", [ONE_RANK, TWO_GPUS])
def test_holding_up_shows_a_missing_wait(run_on_ranks: RunOnRanks, place: Place) -> None:
    for right, wrong in run_on_ranks(place.ranks, train_without_a_wait, place):
        assert not all(map(torch.equal, right, wrong))


def train_in_groups(place: Place) -> tuple[list[Tensor], list[Tensor]]:
    """Each rank a group of its own, which averages with the others: on the CPU, and on the device."""
    device, all_ranks = place.enter()

    def train(device: torch.device, backend: str, all_ranks: dist.ProcessGroup) -> list[Tensor]:
        groups = [dist.new_group([rank], backend=backend) for rank in range(place.ranks)]
        options = {"stage": 2, "average_every": 2, "average_group": all_ranks}
        return train_elementwise(options, sums_here, device, groups[dist.get_rank()])

    return train(torch.device("cpu"), "gloo", dist.group.WORLD), train(device, place.backend, all_ranks)


@pytest.mark.parametrize("place", [ON_CPU, ONE_GPU, TWO_GPUS])
def test_groups_average_to_the_bits_of_the_cpu(run_on_ranks: RunOnRanks, place: Place) -> None:
    (on_cpu, there), (_, on_other) = run_on_ranks(place.ranks, train_in_groups, place)
    assert all(map(torch.equal, on_cpu, there))
    params = len(there) // 2
    assert all(map(torch.equal, there[:params], on_other[:params])), "the last step averaged"


# Loops and options, with collectives held up or not.


@dataclass(frozen=True)
class Loop:
    """A way to train, and the stages in which it gives the same bits.

    Clipping adds up squares slice by slice, and sums over several backward passes are those of whole gradients in stage 0.
    """

    options: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    no_sync: bool = False
    scales: bool = False
    stages: tuple[int, ...] = STAGES


LOOPS = {
    "plain": Loop(),
    "accumulated": Loop(micro_batches=2, stages=(1, 2)),
    "no_sync": Loop(micro_batches=2, no_sync=True),
    "clipped": Loop({"max_grad_norm": 0.1}, stages=(1, 2)),
    "loss scaler, torch's clipping": Loop(scales=True, stages=(1, 2)),
    "bfloat16, four buffers": Loop({"param_dtype": BF16, "bucket_buffers": 4, "cast_inputs": True}, stages=(1, 2)),
    "no overlap": Loop({"overlap": False}),
    "step in backward": Loop({"step_in_backward": True}, stages=(2,)),
}


def train_loop(loop: Loop, stage: int, device: torch.device, group: dist.ProcessGroup) -> list[Tensor]:
    net = build("mlp").to(device)
    options = {"process_group": group, "transport": sums_here, "bucket_mb": BUCKET_MB, **loop.options}
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=stage, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=loop.scales)
    for step in range(STEPS):
        for micro in range(loop.micro_batches):
            last = micro == loop.micro_batches - 1
            with model.no_sync() if loop.no_sync and not last else nullcontext():
                inputs = batch("mlp", step * loop.micro_batches + micro).to(device)
                scaler.scale(loss_of(model(inputs).float())).backward()
        if loop.scales:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [param.detach().cpu() for param in net.parameters()]


def train_loop_in_stages(place: Place, name: str) -> list[list[Tensor]]:
    """Of each stage, at once and with collectives held up."""
    device, group = place.enter()
    results = []
    with exact():
        for stage in LOOPS[name].stages:
            results.append(train_loop(LOOPS[name], stage, device, group))
            with held_up(device):
                results.append(train_loop(LOOPS[name], stage, device, group))
    return results


@each_place
@pytest.mark.parametrize("name", LOOPS)
def test_stages_and_ranks_agree_however_late_collectives_are(run_on_ranks: RunOnRanks, place: Place, name: str) -> None:
    (first, *rest), *other_ranks = run_on_ranks(place.ranks, train_loop_in_stages, place, name)
    assert all(bool(value.isfinite().all()) for value in first)
    for number, result in enumerate([*rest, *(result for rank in other_ranks for result in rank)]):
        assert all(map(torch.equal, first, result)), f"result {number + 1} of all stages and ranks"


def train_without_host_waits(place: Place, options: dict[str, Any]) -> int:
    """How many steps have run with torch raising an error wherever it would make the host wait for the device."""
    device, group = place.enter()
    net = Elementwise().to(device)
    model, optimizer = zeroopt.wrap(
        *(net, torch.optim.AdamW(net.parameters(), lr=0.01)),
        **{"process_group": group, "transport": sums_here, "bucket_mb": BUCKET_MB, **options},
    )
    targets = [net.targets(step).to(device) for step in range(2 * STEPS)]
    steps = 0
    for target in targets:
        with waits_forbidden(device) if steps >= STEPS else nullcontext():
            model(target).backward()
            optimizer.step()
            optimizer.zero_grad()
        steps += 1
    return steps


@contextmanager
def waits_forbidden(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":  # where nobody waits
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("place", [ON_CPU, ONE_RANK, TWO_GPUS])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tier", ["float32", "remainder, 8-bit moments", "clipped"])
def test_the_host_waits_for_nothing(run_on_ranks: RunOnRanks, place: Place, tier: str, stage: int) -> None:
    options = {"stage": stage, **({"max_grad_norm": 0.1} if tier == "clipped" else TIERS[tier])}
    assert set(run_on_ranks(place.ranks, train_without_host_waits, place, options)) == {2 * STEPS}
