"""TensorBoard and torchinfo report of a wrapped model what they report of the same model under DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from follow import Prepare, follow, inputs, sgd, values, with_ddp
from torch import Tensor, nn
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt

STEPS = 3
WIDTH = 12


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 5))


def whole_grad(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> Tensor | None:
    return optimizer.full_grad(param) if isinstance(optimizer, zeroopt.ZeroOptimizer) else param.grad


def histograms(folder: str) -> list[Tensor]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"histograms": 0})
    events.Reload()
    found: list[Tensor] = []
    for tag in sorted(events.Tags()["histograms"]):
        for event in events.Histograms(tag):
            value = event.histogram_value
            found.append(torch.tensor([value.min, value.max, value.num, value.sum, *value.bucket]))
    return found


def draw_histograms(prepare: Prepare) -> list[Tensor]:
    """All ranks ask for whole gradients, and rank 0 writes them, and the parameters after the step."""
    from torch.utils.tensorboard import SummaryWriter

    is_first = dist.get_rank() == 0
    bare = net()
    model, optimizer = prepare(bare, sgd(bare))
    with TemporaryDirectory() as folder:
        writer = SummaryWriter(folder) if is_first else None
        for step in range(STEPS):
            loss_of(model(inputs(step, 4, WIDTH))).backward()
            grads = {name: whole_grad(optimizer, param) for name, param in bare.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            if writer is not None:
                for name, param in bare.named_parameters():
                    writer.add_histogram(f"gradients/{name}", grads[name], step)
                    writer.add_histogram(f"parameters/{name}", param, step)
        if writer is not None:
            writer.add_graph(bare, inputs(0, 4, WIDTH))
            writer.close()
        found = histograms(folder)
    assert len(found) == (2 * STEPS * len(values(bare)) if is_first else 0)
    return [*found, *values(bare)]


def follow_histograms() -> None:
    follow(draw_histograms, with_ddp())


def test_histograms_are_those_under_ddp(run_on_ranks: RunOnRanks) -> None:
    pytest.importorskip("tensorboard")
    run_on_ranks(2, follow_histograms)


def draw_a_sharded_gradient(folder: Path, stage: int) -> str:
    from torch.utils.tensorboard import SummaryWriter

    bare = net()
    model, optimizer = zeroopt.wrap(bare, sgd(bare), stage=stage)
    loss_of(model(inputs(0, 4, WIDTH))).backward()
    with SummaryWriter(str(folder / str(dist.get_rank()))) as writer:
        for param in bare.parameters():
            with pytest.raises(zeroopt.StateError) as caught:
                writer.add_histogram("gradient", param.grad)
    optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_has_no_elements_is_refused(run_on_ranks: RunOnRanks, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("tensorboard")
    for message in run_on_ranks(2, draw_a_sharded_gradient, tmp_path, stage):
        assert "Call optimizer.full_grad(param) on all ranks for the whole gradient" in message


def summarise(model: nn.Module) -> list[Any]:
    import torchinfo

    found = torchinfo.summary(model, input_data=inputs(99, 4, WIDTH), verbose=0)
    return [found.total_params, found.trainable_params, found.total_mult_adds, found.total_param_bytes]


def summarise_while_training(prepare: Prepare) -> list[Tensor]:
    """Before wrapping, after each step, and then on rank 0 alone."""
    bare = net()
    seen = summarise(bare)
    model, optimizer = prepare(bare, sgd(bare))
    for step in range(STEPS):
        loss_of(model(inputs(step, 4, WIDTH))).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += summarise(model)
        if dist.get_rank() == 0:
            seen += summarise(bare)
    return [torch.tensor(float(number)) for number in seen] + values(bare)


def follow_summaries() -> None:
    follow(summarise_while_training, with_ddp())


def test_summaries_are_those_under_ddp(run_on_ranks: RunOnRanks) -> None:
    pytest.importorskip("torchinfo")
    run_on_ranks(2, follow_summaries)
