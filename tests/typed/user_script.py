"""What people write with zeroopt: most of its public functions and classes, each in its place."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zeroopt
import zeroopt.checkpoint
from zeroopt import Feature, ZeroDataParallel, ZeroOptimizer
from zeroopt.checkpoint import RandomState, StopRequest
from zeroopt.collectives import Transport, TransportFactory, Wire, hierarchy, registered
from zeroopt.data import GlobalBatchSampler
from zeroopt.elastic import Guard
from zeroopt.feature import Bucket, GradientStore, Step, Stripe
from zeroopt.ops import SegmentTable, StepControl, StepKernel
from zeroopt.optim import FusedAdamW, FusedLAMB, FusedLion
from zeroopt.planner import MemoryEstimate
from zeroopt.simulator import Machine, Simulated, simulate


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def wrap_plainly() -> tuple[ZeroDataParallel, ZeroOptimizer]:
    net = make_model()
    return zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=1e-3), stage=2)


def outer_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


class LargestSum(Feature):
    def __init__(self) -> None:
        self.largest = 0.0
        self.steps = 0

    def backward_begins(self) -> None:
        self.largest = 0.0

    def bucket_filled(self, bucket: Bucket, stripe: Stripe, full: Tensor) -> None:
        assert full.numel() > 0

    def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
        self.largest = max(self.largest, store.reduced.abs().max().item())

    def after_step(self, step: Step) -> None:
        self.steps = step.number


class Coarse(Wire):
    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        return full.mul_(256).round_().div_(256)

    def combine(self, slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
        super().combine(slices, out, base)


def wrap_with_every_option(group: dist.ProcessGroup, factory: TransportFactory) -> None:
    net = make_model()
    model, optimizer = zeroopt.wrap(
        net,
        FusedAdamW(net.parameters(), lr=1e-3),
        stage=1,
        process_group=group,
        bucket_mb=4.0,
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.bfloat16,
        master_weights="remainder",
        state_dtype=torch.int8,
        max_grad_norm=1.0,
        fused=True,
        transport="auto",
        overlap=False,
        broadcast_buffers=False,
        sync_module_states=False,
        share_parameters=True,
        average_every=8,
        bucket_buffers=3,
        cast_inputs=True,
        norm_group=group,
        check_every=100,
        average_group=group,
        outer_optimizer=outer_sgd,
        outer_fragments=2,
        outer_delay=1,
        outer_mixing=0.5,
        outer_dtype="int8",
        parameter_compression="int8",
        shard_group=group,
        features=[LargestSum()],
        wire=Coarse(),
        gradient_compression="int4",
        state_device="cpu",
        step_in_backward=False,
        micro_batches=4,
        matrix_splits={"*.qkv.weight": 3, "*.kv.weight": (64, 64), "head.weight": zeroopt.Split(2, dim=1)},
        init=[zeroopt.reset_parameters, "runs/step-100"],
        device=torch.device("cpu"),
    )
    outer: torch.optim.Optimizer | None = optimizer.outer_optimizer
    assert model.sit_out() or outer is None
    for transport in (factory, hierarchy(8, 32), registered, partial(registered, symmetric=True)):
        zeroopt.wrap(net, FusedLAMB(net.parameters()), transport=transport)


def own_transport(group: dist.ProcessGroup, device: torch.device) -> Transport:
    return registered(group, device, symmetric=device.type == "cuda")


def train(model: ZeroDataParallel, optimizer: ZeroOptimizer) -> float | None:
    sampler = GlobalBatchSampler(512, 32, micro_batches=2, seed=1)
    data = TensorDataset(torch.randn(512, 64), torch.randn(512, 64))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    last: float | None = None
    with model.join(throw_on_early_termination=False):
        for inputs, targets in DataLoader(data, batch_sampler=sampler):
            with model.no_sync():
                (nn.functional.mse_loss(model(inputs), targets) / 2).backward()  # pyright: ignore[reportUnknownMemberType]  torch's
            loss: Tensor = nn.functional.mse_loss(model(inputs), targets) / 2
            loss.backward()  # pyright: ignore[reportUnknownMemberType]  torch's
            norm: Tensor = optimizer.clip_grad_norm_(1.0, norm_type=2.0)
            last = optimizer.step()
            sampler.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            print(sampler.epoch, sampler.position, norm.item(), optimizer.grad_norm.item())
    weight = next(model.parameters())
    gradient: Tensor | None = optimizer.full_grad(weight)
    exact: Tensor = optimizer.full_parameter(weight)
    with torch.no_grad(), model.write_parameters() as is_mine:
        if is_mine and gradient is not None:
            weight.mul_(0.5).add_(exact, alpha=0.5)
    return last


def train_by_two(net: nn.Module, matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> nn.Module:
    model, lion = zeroopt.wrap(net, FusedLion(matrices, lr=1e-4))
    model, adamw = zeroopt.wrap(model, torch.optim.AdamW(rest))
    adamw.add_param_group({"params": matrices[:1], "lr": 0.1})
    plain, optimizers = zeroopt.unwrap(model, [lion, adamw])
    kinds: list[type[torch.optim.Optimizer]] = [type(optimizer) for optimizer in optimizers]
    assert len(kinds) == 2
    return plain


def save_and_go_on(model: ZeroDataParallel, optimizer: ZeroOptimizer, root: Path) -> int:
    with_us = {"random": RandomState()}
    extra = zeroopt.checkpoint.resume(root, model, optimizer, rank_extra=with_us)
    first = int(extra.get("step", 0))
    stop = StopRequest()
    guard = Guard(model, optimizer, every=2, job="typed")
    for step in range(guard.restore(newer_than=first).get("step", first), 100):
        train(model, optimizer)
        guard.step(step)
        if stop.came():
            zeroopt.checkpoint.save(root / f"step-{step}", model, optimizer, {"step": step}, rank_extra=with_us, keep=2)
            break
    saved: Future[None] = zeroopt.checkpoint.async_save(root / "last", model, [optimizer], trained_only=True)
    saved.result()
    newest: Path | None = zeroopt.checkpoint.latest(root, "step-*")
    if newest is not None:
        zeroopt.checkpoint.load(newest, model, optimizer, strict=False)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.full_state_dict()}, root / "all.pt")
    optimizer.load_state_dict(zeroopt.checkpoint.from_deepspeed(root, model.module, optimizer))
    optimizer.load_state_dict(zeroopt.checkpoint.from_zero_redundancy(optimizer.state_dict(), optimizer))
    stop.close()
    guard.close()
    return first


def give_back(model: ZeroDataParallel, optimizer: ZeroOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    plain: nn.Module = zeroopt.unwrap(model)
    both: tuple[nn.Module, torch.optim.Optimizer] = zeroopt.unwrap(model, optimizer)
    return plain, both[1]


def plan(net: nn.Module) -> list[str]:
    estimate: MemoryEstimate = zeroopt.estimate_memory(net, torch.optim.AdamW, world_size=8, memory=24e9, stage=2)
    machine = Machine(host_ranks=8, flops=1e14, memory_bandwidth=2e12)
    simulated: Simulated = simulate(net, torch.optim.AdamW, machine, world_size=64, tokens=1 << 20)
    return [*estimate.lines(), *simulated.lines(), f"{estimate.peak} {simulated.step_s}"]


def use_kernels(values: Tensor, table: SegmentTable, groups: Tensor) -> Tensor:
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    scales = torch.empty(zeroopt.ops.num_blocks(values.numel()))
    zeroopt.ops.quantize(values, codes, scales)
    kernel: StepKernel = zeroopt.ops.adamw
    active, steps = torch.ones(len(groups), dtype=torch.uint8), torch.zeros(2, len(groups))
    kernel(table, active=active, steps=steps, groups=groups, control=StepControl(seed=1))
    out = torch.empty_like(values)
    zeroopt.ops.reduce([values, values], out)
    return out


def main() -> None:
    dist.init_process_group()
    model, optimizer = wrap_plainly()
    try:
        train(model, optimizer)
    except (zeroopt.NonFiniteError, zeroopt.RankMismatchError, zeroopt.CollectiveError) as error:
        print(error)
    except zeroopt.ZeroOptError as error:
        print(type(error).__name__, zeroopt.__version__, zeroopt.build_info()["compiler"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
