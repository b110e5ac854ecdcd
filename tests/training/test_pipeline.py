"""Data parallelism beside pipeline parallelism: two stages, each on two data-parallel ranks, under torch's schedules."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not hasattr(pytest.importorskip("torch.distributed.tensor"), "DTensor"):
    pytest.skip("needs torch 2.5", allow_module_level=True)
pytest.importorskip("torch.distributed.pipelining")

import parallel
from parallel import Mesh, OptimizerFactory, make_mesh, tokens, whole_params
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worker_pool import RunOnRanks

import zeroopt

if "scale_grads" not in inspect.signature(ScheduleGPipe).parameters:
    pytest.skip("this torch's schedules always scale gradients", allow_module_level=True)

STEPS = 3
MICRO_BATCHES = 4
CPU = torch.device("cpu")
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class Front(nn.Module):
    """The first pipeline stage."""

    def __init__(self, model: parallel.Transformer) -> None:
        super().__init__()
        self.embed, self.block = model.embed, model.block

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(self.embed(tokens))


class Back(nn.Module):
    """The last pipeline stage."""

    def __init__(self, model: parallel.Transformer) -> None:
        super().__init__()
        self.norm, self.head, self.scale = model.norm, model.head, model.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)) * self.scale


def build_stage(index: int, dtype: torch.dtype) -> nn.Module:
    model = parallel.build(dtype)
    return Front(model) if index == 0 else Back(model)


def micro_loss(logits: Tensor, batch: Tensor) -> Tensor:
    """A micro-batch's share of the mean over the batch: nobody has to scale gradients afterwards."""
    return parallel.loss_of(logits, batch) / MICRO_BATCHES


class Pipeline:
    """This rank's stage, wrapped, and the schedule that trains it."""

    def __init__(
        self,
        mesh: Mesh,
        schedule: str,
        factory: OptimizerFactory,
        dtype: torch.dtype = torch.float64,
        *,
        scale_grads: bool = False,
        **options: Any,
    ) -> None:
        self.mesh = mesh
        self.index = mesh["pp"].get_local_rank()
        group = mesh["pp"].get_group()
        self.net = build_stage(self.index, dtype)
        self.model, self.optimizer = zeroopt.wrap(
            self.net,
            factory(self.net.parameters()),
            process_group=mesh["dp"].get_group(),
            bucket_mb=0.004,
            norm_group=group,
            **options,
        )
        stage = PipelineStage(self.model, self.index, 2, CPU, group=group)
        loss = parallel.loss_of if scale_grads else micro_loss
        self.schedule = SCHEDULES[schedule](stage, MICRO_BATCHES, loss_fn=loss, scale_grads=scale_grads)

    def backward(self, step: int) -> None:
        batch = tokens(step, self.mesh["dp"].get_local_rank())
        if self.index == 0:
            self.schedule.step(batch)
        else:
            self.schedule.step(target=batch)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_model_params(self, params: list[Tensor]) -> list[Tensor]:
        """Of all parameters of the whole model, in its order, those of this stage."""
        names = dict(zip(dict(parallel.build().named_parameters()), params, strict=True))
        return [names[name] for name, _ in self.net.named_parameters()]


def largest_error(values: list[Tensor], expected: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(values, expected, strict=True))


def follow_one_process(schedule: str, norm_type: float) -> list[tuple[float, list[float], list[float]]]:
    """For each stage of zeroopt: the largest difference to the whole model in one process, the norms here and there."""
    mesh = make_mesh(pp=2, dp=2)
    clip = (0.05, norm_type)
    expected_norms, expected = parallel.train_alone(parallel.sgd, torch.float64, STEPS, clip)
    results = []
    for zero_stage in (0, 1, 2):
        pipeline = Pipeline(mesh, schedule, parallel.sgd, stage=zero_stage)
        error, norms = 0.0, []
        for step in range(STEPS):
            pipeline.backward(step)
            norms.append(pipeline.optimizer.clip_grad_norm_(*clip).item())
            pipeline.step()
            want = pipeline.whole_model_params(expected[step])
            error = max(error, largest_error(whole_params(pipeline.net), want))
        results.append((error, norms, expected_norms))
    return results


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_training_follows_one_process(run_on_ranks: RunOnRanks, schedule: str, norm_type: float) -> None:
    ranks = run_on_ranks(4, follow_one_process, schedule, norm_type)
    for results in ranks:
        assert [norms for _, norms, _ in results] == [norms for _, norms, _ in ranks[0]]
        for error, norms, expected_norms in results:
            assert error < 1e-9
            assert norms == pytest.approx(expected_norms, rel=1e-6)  # the norm is returned as float32


def follow_whole_model(schedule: str, options: dict[str, Any]) -> bool:
    """Whether the stages get the very bits that the whole model gets, wrapped likewise and fed the same micro-batches."""
    mesh = make_mesh(pp=2, dp=2)
    net = parallel.build()
    model, optimizer = zeroopt.wrap(
        net, parallel.adamw(net.parameters()), process_group=mesh["dp"].get_group(), **options
    )
    pipeline = Pipeline(mesh, schedule, parallel.adamw, torch.float32, **options)
    same = True
    for step in range(STEPS):
        for batch in tokens(step, mesh["dp"].get_local_rank()).chunk(MICRO_BATCHES):
            micro_loss(model(batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        pipeline.backward(step)
        pipeline.step()
        want = pipeline.whole_model_params(whole_params(net))
        same &= all(torch.equal(a, b) for a, b in zip(whole_params(pipeline.net), want, strict=True))
    return same


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("GPipe", {"stage": 1}),
        ("1F1B", {"stage": 2}),
        ("1F1B", {"stage": 2, "transport": "pairwise"}),
        ("GPipe", {"stage": 2, "param_dtype": torch.bfloat16}),
        ("1F1B", {"stage": 1, "param_dtype": torch.bfloat16, "share_parameters": True}),
    ],
)
def test_stages_get_the_bits_of_the_whole_model(
    run_on_ranks: RunOnRanks, schedule: str, options: dict[str, Any]
) -> None:
    assert run_on_ranks(4, follow_whole_model, schedule, options) == [True] * 4


def let_the_schedule_scale(stage: int) -> float:
    """The schedule divides `param.grad` itself, which in stages 1 and 2 stands for slices."""
    mesh = make_mesh(pp=2, dp=2)
    _, expected = parallel.train_alone(parallel.sgd, torch.float64, STEPS)
    pipeline = Pipeline(mesh, "1F1B", parallel.sgd, stage=stage, scale_grads=True)
    for step in range(STEPS):
        pipeline.backward(step)
        pipeline.step()
    return largest_error(whole_params(pipeline.net), pipeline.whole_model_params(expected[-1]))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_schedule_may_scale_gradients(run_on_ranks: RunOnRanks, stage: int) -> None:
    assert all(error < 1e-9 for error in run_on_ranks(4, let_the_schedule_scale, stage))


def split_both_ways(zero_stage: int) -> tuple[float, list[float], list[float]]:
    """Pipeline and tensor parallelism, and one data-parallel rank for each part."""
    mesh = make_mesh(pp=2, dp=1, tp=2)
    clip = (0.05, 2.0)
    model = parallel.build(torch.float64)
    optimizer = parallel.sgd(model.parameters())
    index = mesh["pp"].get_local_rank()
    net = build_stage(index, torch.float64)
    plan = (
        {"block.mlp.0": ColwiseParallel(), "block.mlp.2": RowwiseParallel()}
        if index == 0
        else {"head": ColwiseParallel(output_layouts=parallel.Replicate())}
    )
    parallelize_module(net, mesh["tp"], plan)
    group = mesh["pp"].get_group()
    wrapped, sharded = zeroopt.wrap(
        net,
        parallel.sgd(net.parameters()),
        stage=zero_stage,
        process_group=mesh["dp"].get_group(),
        norm_group=group,
    )
    schedule = ScheduleGPipe(
        PipelineStage(wrapped, index, 2, CPU, group=group), MICRO_BATCHES, loss_fn=micro_loss, scale_grads=False
    )
    norms, expected_norms = [], []
    for step in range(2):
        batch = tokens(step, 0)
        parallel.loss_of(model(batch), batch).backward()
        expected_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), *clip).item())
        _ = schedule.step(batch) if index == 0 else schedule.step(target=batch)
        norms.append(sharded.clip_grad_norm_(*clip).item())
        for each in (optimizer, sharded):
            each.step()
            each.zero_grad()
    names = dict(model.named_parameters())
    expected = [names[name] for name, _ in net.named_parameters()]
    return largest_error(whole_params(net), expected), norms, expected_norms


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_pipeline_and_tensor_parallelism(run_on_ranks: RunOnRanks, zero_stage: int) -> None:
    for error, norms, expected_norms in run_on_ranks(4, split_both_ways, zero_stage):
        assert error < 1e-9
        assert norms == pytest.approx(expected_norms, rel=1e-6)


def interleave() -> float:
    """Two stages on each rank, wrapped together; largest difference to the same layers in one process."""
    mesh = make_mesh(pp=2, dp=2)
    rank, data_rank = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()

    def build() -> list[nn.Module]:
        torch.manual_seed(5)
        return [nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for _ in range(4)]

    def loss_of(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().mean()

    whole, layers = nn.Sequential(*build()), build()
    plain = parallel.sgd(whole.parameters())
    mine = nn.ModuleList([layers[rank], layers[rank + 2]])
    _, optimizer = zeroopt.wrap(mine, parallel.sgd(mine.parameters()), process_group=mesh["dp"].get_group())
    group = mesh["pp"].get_group()
    stages = [PipelineStage(layers[i], i, 4, CPU, group=group) for i in (rank, rank + 2)]
    schedule = ScheduleInterleaved1F1B(
        stages, MICRO_BATCHES, loss_fn=lambda out, target: loss_of(out, target) / MICRO_BATCHES, scale_grads=False
    )
    for step in range(STEPS):
        x = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        loss_of(whole(x.flatten(0, 1)), x.flatten(0, 1).flip(-1)).backward()
        arguments = (x[data_rank],) if rank == 0 else ()
        options = {"target": x[data_rank].flip(-1)} if rank == 1 else {}
        schedule.step(*arguments, **options)
        for each in (plain, optimizer):
            each.step()
            each.zero_grad()
    expected = [*whole[rank].parameters(), *whole[rank + 2].parameters()]
    return largest_error(list(mine.parameters()), expected)


def test_two_stages_on_a_rank(run_on_ranks: RunOnRanks) -> None:
    assert all(error < 1e-9 for error in run_on_ranks(4, interleave))
