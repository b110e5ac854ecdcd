"""Models of many kinds train as under DistributedDataParallel: kinds of parameters, of modules, of norms and their buffers."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from follow import STEPS, WIDTH, Prepare, averaged_by_hand, follow, inputs, layers, sgd, train, values, with_ddp
from torch import Tensor, nn
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt
from tests.parameters.test_arriving import delay_the_last_gather

DELAY_S = 0.02  # so that parameters are on their way when they are read; what comes out does not depend on it


class OfAllKinds(nn.Module):
    """Parameters of several dtypes, transposed, empty, 0-dim, and computed from others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5, dtype=torch.float64)
        self.narrow = nn.Parameter(torch.randn(WIDTH, dtype=torch.bfloat16))
        self.transposed = nn.Parameter(torch.randn(6, WIDTH).t())
        self.empty, self.scale = nn.Parameter(torch.empty(0)), nn.Parameter(torch.tensor(2.0))
        self.of_unit_norm = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.by_norm = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * (self.transposed.sum(1) + self.narrow.float()) * self.scale + self.empty.sum()
        return self.wide(self.by_norm(self.of_unit_norm(x)).tanh().double())


def train_all_kinds(prepare: Prepare) -> list[Tensor]:
    net = OfAllKinds()
    params = train(prepare, net, lambda model, step: [loss_of(model(inputs(step, 4, WIDTH)))])
    return [*(param.float() for param in params), *(buffer.clone() for buffer in net.buffers())]


class RunByCompiledCode(nn.Module):
    """Modules that hand their parameters, or those of other modules, to compiled code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.gru = nn.LSTM(8, 8, 2, batch_first=True), nn.GRU(8, 4, batch_first=True, bidirectional=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.bag, self.join = nn.EmbeddingBag(11, 8), nn.Bilinear(8, 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.gru(self.lstm(x)[0])[0])
        y, _ = self.attention(y, y, y)
        return self.join(y.mean(dim=1), self.bag((3 * x[..., 0].abs()).long() % 11))


def train_and_evaluate(prepare: Prepare) -> list[Tensor]:
    """The bare model is run right after each step, when updated parameters may still be on their way."""
    net = RunByCompiledCode()
    model, optimizer = prepare(net, sgd(net))
    if isinstance(optimizer, zeroopt.ZeroOptimizer) and dist.get_rank() == 1:
        delay_the_last_gather(optimizer, partial(time.sleep, DELAY_S))
    seen = []
    for step, mode in enumerate((torch.no_grad, torch.inference_mode, torch.no_grad, torch.enable_grad)):
        model.train()
        loss_of(model(inputs(step, 3, 4, 8))).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with mode():
            at_once, later = (net(inputs(step + 50, 3, 4, 8)).detach().clone() for _ in range(2))
        torch.testing.assert_close(at_once, later)  # attention rounds in another way for parameters on their way
        seen.append(later)
    return [*values(net), *seen]


def follow_kinds() -> None:
    follow(train_all_kinds, with_ddp())
    follow(train_and_evaluate, with_ddp(), bucket_mb=0.005)  # each bucket costs the delay


@pytest.mark.parametrize("world_size", [2, 3])
def test_kinds_of_parameters_and_modules_follow_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_kinds)


# Buffers and norms.


class Normalised(nn.Module):
    """Every norm that keeps statistics, one of which is averaged over all steps, and buffers of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norms = nn.Sequential(
            nn.BatchNorm2d(6, momentum=None), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        )
        self.out = nn.Linear(6, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1 + dist.get_rank()
        self.largest = torch.maximum(self.largest, x.detach().max())
        return self.out(self.norms(self.conv(x)).mean(dim=(2, 3)))


def train_with_statistics(prepare: Prepare) -> list[Tensor]:
    torch.manual_seed(0)
    net = Normalised()
    params = train(prepare, net, lambda model, step: [loss_of(model(inputs(step, 4, 3, 6, 6)))])
    assert net.calls == STEPS + dist.get_rank()  # rank 0's count, and one call of this rank's own
    return [*params, *(buffer.clone() for buffer in net.buffers())]


def train_without_broadcast(prepare: Prepare) -> list[Tensor]:
    """With `broadcast_buffers=False`, every rank keeps buffers of its own."""
    torch.manual_seed(0)
    net = Normalised()
    params = train(prepare, net, lambda model, step: [loss_of(model(inputs(step, 4, 3, 6, 6)))])
    assert net.calls == STEPS * (1 + dist.get_rank())
    return [*params, *(buffer.clone() for buffer in net.buffers())]


def train_synchronised_norms(prepare: Prepare) -> list[Tensor]:
    """SyncBatchNorm with its statistics at rest, which is what of it runs without an accelerator."""
    torch.manual_seed(0)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Normalised())
    assert isinstance(net.norms[0], nn.SyncBatchNorm)
    net.norms.eval()
    return train(prepare, net, lambda model, step: [loss_of(model(inputs(step, 4, 3, 6, 6)))])


def follow_norms() -> None:
    follow(train_with_statistics, with_ddp())
    follow(train_without_broadcast, with_ddp(broadcast_buffers=False), broadcast_buffers=False)
    follow(train_synchronised_norms, averaged_by_hand)  # DDP refuses it on the CPU in any mode


@pytest.mark.parametrize("world_size", [2, 3])
def test_norms_and_buffers_follow_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_norms)


# Parameters that are not trained.


class WithConstants(nn.Module):
    """Integer and complex parameters, other ones on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()
        self.table = nn.Parameter(torch.arange(WIDTH) + dist.get_rank(), requires_grad=False)
        self.phases = nn.Parameter(torch.full((WIDTH,), 1j + dist.get_rank()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * self.table) * self.phases.abs()


def train_next_to_constants(prepare: Prepare) -> list[Tensor]:
    """They become rank 0's, and stay."""
    net = WithConstants()
    results = train(prepare, net, lambda model, step: [loss_of(model(inputs(step, 4, WIDTH)))])
    assert torch.equal(net.table, torch.arange(WIDTH))
    return [torch.view_as_real(value) if value.is_complex() else value for value in results]


def follow_next_to_constants() -> None:
    follow(train_next_to_constants, with_ddp())


@pytest.mark.parametrize("world_size", [2, 3])
def test_integer_and_complex_constants_follow_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_next_to_constants)
