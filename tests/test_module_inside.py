"""A wrapped model as a part of a larger module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from worker_pool import RunOnRanks

import zeroopt


class Actor(nn.Module):
    """A parameter of its own, children, and buffers with a version."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5, 0.7]))
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2))
        self.norm = nn.BatchNorm1d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers(x).float()) * self.scale


class Agent(nn.Module):
    """Two parts, and a parameter that is in neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.temperature = nn.Parameter(torch.ones(2))
        self.actor: nn.Module = Actor()
        self.critic: nn.Module = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.critic.parameters()).dtype)
        return self.actor(x).float().mean() + self.critic(x).float().mean() + self.temperature.sum()


def wrap_parts(options: dict[str, Any]) -> tuple[Agent, list[zeroopt.ZeroOptimizer]]:
    agent, optimizers = Agent(), []
    for name in ("actor", "critic"):
        part = getattr(agent, name)
        wrapped, optimizer = zeroopt.wrap(part, torch.optim.AdamW(part.parameters(), lr=0.01), **options)
        setattr(agent, name, wrapped)
        optimizers.append(optimizer)
    return agent, optimizers


def train_step(agent: Agent, optimizers: list[zeroopt.ZeroOptimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    (agent(torch.randn(5, 6, generator=generator)) - 1).square().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def look_at(options: dict[str, Any]) -> None:
    plain, (agent, optimizers) = Agent(), wrap_parts(options)
    train_step(agent, optimizers, 0)
    for names in ("named_parameters", "named_buffers"):
        assert [n for n, _ in getattr(agent, names)()] == [n for n, _ in getattr(plain, names)()], names
    assert set(dict(agent.named_modules())) == set(dict(plain.named_modules()))
    assert dict(agent.named_modules(remove_duplicate=False))["actor.norm"] is agent.actor.module.norm
    saved = agent.state_dict()
    assert list(saved) == list(plain.state_dict())
    assert saved._metadata == plain.state_dict()._metadata
    saved = copy.deepcopy(saved)
    dist.barrier()  # before anybody writes what ranks may share

    exact = {name: value.float() + 1.0 for name, value in saved.items()}
    assert agent.load_state_dict(exact, strict=True).missing_keys == []
    for part, optimizer in zip(("actor", "critic"), optimizers, strict=True):
        for name, param in getattr(agent, part).named_parameters():
            assert torch.equal(optimizer.full_parameter(param), exact[f"{part}.{name}"]), name
    train_step(agent, optimizers, 1)

    broken = dict(saved)
    broken["actor.more"] = broken.pop("actor.layers.0.bias")
    with pytest.raises(RuntimeError) as error:
        agent.load_state_dict(broken)
    assert '"actor.layers.0.bias"' in str(error.value) and '"actor.more"' in str(error.value)
    with pytest.raises(zeroopt.ConfigError, match="assign=True"):
        agent.load_state_dict(exact, assign=True)
    agent.load_state_dict(saved)

    twin = copy.deepcopy(agent)
    assert type(twin.actor) is Actor and type(twin.critic) is nn.Linear
    twin.load_state_dict(saved)
    plain.load_state_dict(saved)
    got = get_model_state_dict(agent)
    assert list(got) == list(saved) and all(torch.equal(got[name], saved[name]) for name in saved)
    set_model_state_dict(agent, exact)
    assert torch.equal(optimizers[0].full_parameter(agent.actor.scale), exact["actor.scale"])
    dist.barrier()


@pytest.mark.parametrize(
    "options",
    [
        {"stage": 0},
        {"stage": 2},
        {"stage": 2, "share_parameters": True},
        {"stage": 1, "param_dtype": torch.bfloat16},
        {"param_dtype": torch.bfloat16, "master_weights": "remainder", "share_parameters": True},
    ],
    ids=str,
)
def test_a_larger_module_sees_the_bare_model(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    run_on_ranks(2, look_at, options)


def modes() -> None:
    """What goes from module to module reaches the model and its children, once."""
    agent, optimizers = wrap_parts({"stage": 2})
    seen: list[nn.Module] = []
    agent.apply(seen.append)
    assert seen.count(agent.actor.module) == seen.count(agent.actor.module.norm) == 1
    agent.eval()
    assert not any(module.training for module in agent.modules())
    agent.train()
    assert all(module.training for module in agent.modules())
    agent.requires_grad_(False)
    assert not agent.actor.scale.requires_grad
    agent.requires_grad_(True)
    with pytest.raises(zeroopt.StateError, match=r"moved, cast"):
        agent.bfloat16().actor.norm.float()
        train_step(agent, optimizers, 0)


def test_modes_reach_everything(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, modes)
