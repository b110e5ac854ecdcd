"""A model that is dropped with its optimizer is gone at once, by the count of references alone, with all that it held."""

from __future__ import annotations

import gc
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
import whole_optimizers
from training import batch, build, loss_of
from transports import MEMORY, hosts, open_memory
from worker_pool import RunOnRanks

import zeroopt

T = TypeVar("T")

PATIENCE_S = 120.0  # until a thread has ended that was told to


def outer(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7)


STAGES: list[dict[str, Any]] = [{"stage": stage} for stage in (0, 1, 2)]
TRANSPORTS: list[dict[str, Any]] = [{"transport": name} for name in ("pairwise", "tree", "torch", "all_to_all")]
OPTIONS: list[dict[str, Any]] = [
    {"share_parameters": True},
    {"overlap": False},
    {"param_dtype": torch.bfloat16, "master_weights": "remainder", "cast_inputs": True, "model": "mlp"},
    {"max_grad_norm": 1.0, "check_every": 1},
    {"fused": False, "broadcast_buffers": False},
    {"step_in_backward": True},
    {"micro_batches": 1},
    {"gradient_compression": "int8", "transport": "pairwise"},
    {"parameter_compression": "int8"},
    {"average_every": 2},
    {"average_every": 1, "outer_optimizer": outer},
    {"optimizer": whole_optimizers.Lars, "stage": 1},
]
ON_HOSTS: list[dict[str, Any]] = [{"transport": "auto"}, {"shard": True}]


def train(options: dict[str, Any]) -> dict[str, weakref.ref[Any]]:
    """Until a step has been taken whose parameters nobody has read; by name, what is to be gone."""
    options = dict(options)
    make = options.pop("optimizer", torch.optim.AdamW)
    if options.pop("shard", False):
        options["shard_group"] = shard_group()
    name = options.pop("model", "conv")
    net = build(name)
    with whole_optimizers.no_padding():  # whole parameters lie across slices
        model, optimizer = zeroopt.wrap(net, make(net.parameters(), lr=1e-3), bucket_mb=0.001, **options)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for step in range(3):
        loss_of(model(batch(name, step)).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    parts = {"net": net, "parameter": next(net.parameters()), "model": model, "optimizer": optimizer}
    parts |= {"replica": model.replica, "transport": model.replica.transport, "bucket": model.replica.buckets[0]}
    return {name: weakref.ref(part) for name, part in parts.items()}


_shard_groups: list[dist.ProcessGroup] = []


def shard_group() -> dist.ProcessGroup:
    """Of the first two ranks, or of the others; the same each time."""
    if not _shard_groups:
        made = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        _shard_groups.append(made[dist.get_rank() // 2])
    return _shard_groups[0]


def held() -> tuple[int, int, int]:
    """Shared memory of zeroopt's that this process has mapped, and open, and its threads."""
    mapped = Path("/proc/self/maps").read_text().count(MEMORY)
    return mapped, len(open_memory()), threading.active_count()


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it, Python's collector does not run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def what_stays(cases: list[dict[str, Any]], of_hosts: int) -> list[tuple[list[str], bool]]:
    """By case: what is still there when it is dropped for the second time, and whether more is held than after the first."""
    found = []
    per_host = dist.get_world_size() // of_hosts
    on_hosts = hosts([rank // per_host for rank in range(dist.get_world_size())]) if of_hosts > 1 else nullcontext()
    with on_hosts, uncollected():
        for options in cases:
            train(options)  # torch imports what it needs, groups are made, and threads that wait for backends
            dist.barrier()
            before = held()
            parts = train(options)
            # Threads may yet have to pass on what other ranks wait for, and to hear that they are to end.
            left = wait_until(partial(alive, parts), operator.not_)
            after = wait_until(held, lambda now, before=before: now <= before)
            found.append((left, after > before))
            dist.barrier()
    return found


def alive(parts: dict[str, weakref.ref[Any]]) -> list[str]:
    return [name for name, part in parts.items() if part() is not None]


def wait_until(look: Callable[[], T], is_enough: Callable[[T], bool]) -> T:
    """What there is to see when it is enough, or patience is over."""
    end = time.monotonic() + PATIENCE_S
    while not is_enough(now := look()) and time.monotonic() < end:
        time.sleep(0.01)
    return now


@pytest.mark.parametrize(
    ("world_size", "of_hosts", "cases"),
    [(1, 1, STAGES), (2, 1, [*STAGES, *TRANSPORTS, *OPTIONS]), (4, 2, ON_HOSTS)],
    ids=["alone", "one host", "hosts"],
)
def test_nothing_stays_until_the_garbage_is_collected(
    run_on_ranks: RunOnRanks, world_size: int, of_hosts: int, cases: list[dict[str, Any]]
) -> None:
    for answer in run_on_ranks(world_size, what_stays, cases, of_hosts):
        assert [(case, *one) for case, one in zip(cases, answer, strict=True)] == [(case, [], False) for case in cases]


def wrap_again() -> tuple[list[str], bool]:
    """What has been left on the plain optimizer; and whether the model trains on, wrapped anew with another one."""
    net = build("mlp")
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    with uncollected():
        model, optimizer = zeroopt.wrap(net, plain)
        loss_of(model(batch("mlp", 0))).backward()
        optimizer.step()
        del model, optimizer
        left = [name for name in vars(plain) if name in ("zero_grad", "add_param_group")]
        plain.zero_grad()
        model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()))
        before = net.scale.item()
        loss_of(model(batch("mlp", 0))).backward()
        optimizer.step()
        return left, net.scale.item() != before


def test_a_model_can_be_wrapped_again_at_once(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, wrap_again) == [([], True)] * 2


def step_plainly() -> str:
    """What whoever forgets what `wrap` returned is told in the first step, and what is left of his parameters."""
    net = build("mlp")
    plain = torch.optim.AdamW(net.parameters(), lr=0.1)
    with uncollected():
        zeroopt.wrap(net, plain)
        before = net.scale.item()
        loss_of(net(batch("mlp", 0))).backward()
        try:
            plain.step()
        except zeroopt.StateError as error:
            assert net.scale.item() == before
            return str(error)
    return "stepped"


def test_the_plain_optimizer_of_a_dropped_one_does_not_step_ranks_apart(run_on_ranks: RunOnRanks) -> None:
    for message in run_on_ranks(2, step_plainly):
        assert message.startswith(
            "this AdamW was wrapped by zeroopt.wrap, and nothing refers to the model and the optimizer any more"
        )


def go_on_with_one_of_two(options: dict[str, Any]) -> tuple[str, bool]:
    """What comes of a backward, when one of two optimizers has been dropped with the model; and whether the other one's parameters are
    stepped."""
    net = build("mlp")
    params = list(net.parameters())
    with uncollected():
        model, kept = zeroopt.wrap(net, torch.optim.SGD(params[::2], lr=0.1), bucket_mb=0.001, **options)
        model, dropped = zeroopt.wrap(model, torch.optim.SGD(params[1::2], lr=0.1), bucket_mb=0.001, **options)
        before = params[0].detach().clone()
        del model, dropped
        try:
            loss_of(net(batch("mlp", dist.get_rank()))).backward()
        except zeroopt.StateError as error:
            return str(error), False
        kept.step()
        return "", not torch.equal(params[0], before)


def test_one_of_two_optimizers_goes_on_alone(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, go_on_with_one_of_two, {}) == [("", True)] * 2
    for message, _ in run_on_ranks(2, go_on_with_one_of_two, {"step_in_backward": True}):
        assert message.startswith("one of the optimizers that this model was wrapped with is gone")
