"""Optimizers of other packages: those that are accepted train as under DistributedDataParallel, and the others are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from follow import Prepare, follow, inputs, values, with_ddp, with_zeroopt
from torch import Tensor, nn
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt.plan.params import Grain
from zeroopt.probing.grains import find_grains

Make = Callable[[nn.Module], Any]

STEPS = 6
WIDTH = 12
SHARED, WHOLE = Grain.ELEMENT, Grain.PARAMETER

ACCEPTED = {
    "schedulefree": {"AdamWScheduleFree": SHARED, "SGDScheduleFree": SHARED, "RAdamScheduleFree": SHARED},
    "lion_pytorch": {"Lion": SHARED},
    "bitsandbytes.optim": {
        "AdamW": SHARED,
        "PagedAdamW": SHARED,
        "Lion": SHARED,
        "AdamW8bit": WHOLE,
        "Lion8bit": WHOLE,
        "LAMB": WHOLE,
    },
}
REFUSED = {
    (
        "prodigyopt",
        "Prodigy",
    ): "Prodigy steps a parameter differently when others are stepped with it: the option 'd_denom' differs",
    ("schedulefree", "AdamWScheduleFreeClosure"): "missing 1 required positional argument: 'closure'",
    ("torchao.optim", "AdamW8bit"): "AdamW8bit keeps state in tensors of the class OptimState8bit",
    ("torchao.optim", "AdamW4bit"): "AdamW4bit keeps state in tensors of the class OptimState4bit",
    ("torchao.optim", "AdamWFp8"): "AdamWFp8 keeps state in tensors of the class OptimStateFp8",
}


class Net(nn.Module):
    """Small, but for one matrix that has enough elements for its state to be quantised."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def maker(package: str, name: str) -> Make:
    """What makes an optimizer of a package, which only workers import."""
    cls = getattr(__import__(package, fromlist=[name]), name)
    return lambda net: cls(net.parameters(), lr=0.01)


@contextmanager
def evaluating(optimizer: Any) -> Iterator[None]:
    """Schedule-free optimizers show other parameters then."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        yield
        optimizer.train()
    else:
        yield


def run(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        loss_of(model(inputs(step, 4, WIDTH))).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_on_rank_0(optimizer: Any) -> list[Tensor]:
    """All of it, by parameter and name, in torch's own form: bitsandbytes' `state_dict` hides some of it from FSDP."""
    if isinstance(optimizer, zeroopt.ZeroOptimizer):
        optimizer.consolidate_state_dict()
    if dist.get_rank() > 0:
        return []
    is_plain = not isinstance(optimizer, zeroopt.ZeroOptimizer)
    state = (torch.optim.Optimizer.state_dict(optimizer) if is_plain else optimizer.full_state_dict())["state"]
    found = [torch.as_tensor(state[i][name]) for i in sorted(state) for name in sorted(state[i])]
    assert found
    return [value.clone().double() for value in found]


def train_by(make: Make) -> Callable[[Prepare], list[Tensor]]:
    def scenario(prepare: Prepare) -> list[Tensor]:
        net = Net()
        model, optimizer = prepare(net, make(net))
        if hasattr(optimizer, "train"):
            optimizer.train()
        run(model, optimizer, range(STEPS // 2))
        with evaluating(optimizer):
            seen = [*values(net), model(inputs(99, 4, WIDTH)).detach()]
        run(model, optimizer, range(STEPS // 2, STEPS))
        return [*seen, *values(net), *state_on_rank_0(optimizer)]

    return scenario


def follow_and_ask(package: str, name: str) -> list[Grain]:
    make = maker(package, name)
    follow(train_by(make), with_ddp())
    return find_grains(make(Net()))


@pytest.mark.parametrize("package, name", [(package, name) for package, names in ACCEPTED.items() for name in names])
def test_accepted_ones_follow_ddp(run_on_ranks: RunOnRanks, package: str, name: str) -> None:
    pytest.importorskip(package)
    assert run_on_ranks(2, follow_and_ask, package, name) == [[ACCEPTED[package][name]]] * 2


def resume(package: str, name: str, folder: Path) -> None:
    """Saved while a schedule-free optimizer shows its average, as its authors want it."""
    make = maker(package, name)
    for stage in (0, 2):
        net, path = Net(), folder / f"stage-{stage}"
        model, optimizer = with_zeroopt(stage=stage)(net, make(net))
        if hasattr(optimizer, "train"):
            optimizer.train()
        run(model, optimizer, range(STEPS // 2))
        with evaluating(optimizer):
            zeroopt.checkpoint.save(path, model, optimizer)
        other = Net()
        other_model, other_optimizer = with_zeroopt(stage=stage)(other, make(other))
        zeroopt.checkpoint.load(path, other_model, other_optimizer)
        if hasattr(optimizer, "train"):
            other_optimizer.train()
        run(model, optimizer, range(STEPS // 2, STEPS))
        run(other_model, other_optimizer, range(STEPS // 2, STEPS))
        assert all(torch.equal(a, b) for a, b in zip(values(net), values(other), strict=True))


@pytest.mark.parametrize(
    "package, name",
    [("schedulefree", "AdamWScheduleFree"), ("lion_pytorch", "Lion"), ("bitsandbytes.optim", "AdamW8bit")],
)
def test_a_checkpoint_goes_on_bit_for_bit(run_on_ranks: RunOnRanks, tmp_path: Path, package: str, name: str) -> None:
    pytest.importorskip(package)
    run_on_ranks(2, resume, package, name, tmp_path)


def take_over_from_ddp(name: str) -> None:
    """A plain optimizer's state dict, in the format of bitsandbytes, goes on in a wrapped one."""
    make = maker("bitsandbytes.optim", name)
    net = Net()
    model, optimizer = with_ddp()(net, make(net))
    run(model, optimizer, range(STEPS // 2))
    saved, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(STEPS // 2, STEPS))
    for stage in (0, 2):
        other = Net()
        other_model, other_optimizer = with_zeroopt(stage=stage)(other, make(other))
        other_model.load_state_dict(saved)
        other_optimizer.load_state_dict(state)
        run(other_model, other_optimizer, range(STEPS // 2, STEPS))
        assert all(torch.equal(a, b) for a, b in zip(values(net), values(other), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_state_dicts_of_bitsandbytes_load(run_on_ranks: RunOnRanks, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    run_on_ranks(2, take_over_from_ddp, name)


def refuse(package: str, name: str) -> str:
    """The message; the optimizer and the model then are as if nobody had tried."""
    net = Net()
    optimizer = maker(package, name)(net)
    before, attributes = values(net), {*vars(optimizer)}
    with pytest.raises(zeroopt.NotSupportedError) as caught:
        zeroopt.wrap(net, optimizer)
    assert all(map(torch.equal, values(net), before)) and not optimizer.state and {*vars(optimizer)} == attributes
    zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1))
    return str(caught.value)


@pytest.mark.parametrize("package, name", REFUSED)
def test_refused_ones_say_why(run_on_ranks: RunOnRanks, package: str, name: str) -> None:
    pytest.importorskip(package)
    for message in run_on_ranks(2, refuse, package, name):
        assert REFUSED[package, name] in message


def ask_torchao() -> list[Grain]:
    return find_grains(maker("torchao.optim", "_AdamW")(Net()))


def test_torchaos_adamw_of_plain_state_is_shared(run_on_ranks: RunOnRanks) -> None:
    """Asked only: a step of it compiles."""
    pytest.importorskip("torchao.optim")
    assert run_on_ranks(1, ask_torchao) == [[SHARED]]


def override_bits_by_module() -> str:
    """bitsandbytes keeps such options by the number of a parameter, which pieces do not have."""
    import bitsandbytes

    net, manager = Net(), bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_parameters(net.parameters())
    manager.override_config(net.layers[2].weight, "optim_bits", 32)
    try:
        with pytest.raises(zeroopt.NotSupportedError) as caught:
            zeroopt.wrap(net, maker("bitsandbytes.optim", "AdamW8bit")(net))
    finally:
        manager.initialize()
    return str(caught.value)


def test_overridden_bits_are_refused(run_on_ranks: RunOnRanks) -> None:
    pytest.importorskip("bitsandbytes")
    for message in run_on_ranks(2, override_bits_by_module):
        assert "references to parameters in its attribute 'mng'" in message
