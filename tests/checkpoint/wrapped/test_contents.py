"""zeroopt.checkpoint: what is saved is what is loaded, at any world size, stage, bucket size and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    BF16,
    TIERS,
    Recipe,
    Wrapped,
    all_of,
    assert_all_same,
    assert_same,
    train,
    wrap_all,
    wrapped,
)
from remembered import remembered_grains
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training import loss_of
from whole_optimizers import OPTIMIZERS as WHOLE_OPTIMIZERS
from whole_optimizers import build as build_whole
from whole_optimizers import loss_for
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt.checkpoint.format.reading import open_checkpoint

Layout = tuple[int, dict[str, Any]]  # world size, options of zeroopt.wrap

SAVED: list[Layout] = [(3, {"stage": 2, "bucket_mb": 0.002}), (2, {"stage": 0}), (1, {"stage": 2})]
LOADED: list[Layout] = [
    (1, {"stage": 2}),
    (2, {"stage": 0}),
    (2, {"stage": 2, "bucket_mb": 0.001, "transport": "pairwise"}),
    (3, {"stage": 1}),
    (4, {"stage": 2, "fused": False}),
]
CASES = [("lm", "adamw_amsgrad"), ("conv", "sgd_momentum"), ("mlp", "rmsprop"), ("mlp", "sgd")]


def save_cases(path: Path, options: dict[str, Any]) -> list[Any]:
    saved = []
    for case in CASES:
        model, optimizer = wrapped(*case, options)
        train(model, optimizer, case[0], range(2))
        zeroopt.checkpoint.save(path / "-".join(case), model, optimizer, {"epoch": 3})
        saved.append(all_of(model, [optimizer]))
    return saved


def load_cases(path: Path, layouts: list[dict[str, Any]]) -> list[list[Any]]:
    everything = []
    for options in layouts:
        loaded = []
        for case in CASES:
            model, optimizer = wrapped(*case, options)
            for group in optimizer.param_groups:
                group["lr"] = 123.0
            assert zeroopt.checkpoint.load(path / "-".join(case), model, optimizer) == {"epoch": 3}
            loaded.append(all_of(model, [optimizer]))
        everything.append(loaded)
    return everything


def by_world_size(layouts: Iterable[Layout]) -> dict[int, list[dict[str, Any]]]:
    sizes: dict[int, list[dict[str, Any]]] = {}
    for size, options in layouts:
        sizes.setdefault(size, []).append(options)
    return sizes


@pytest.mark.parametrize("layout", SAVED, ids=["3 ranks", "2 ranks", "1 rank"])
def test_any_layout_loads_any_other(run_on_ranks: RunOnRanks, tmp_path: Path, layout: Layout) -> None:
    world_size, options = layout
    saved = run_on_ranks(world_size, save_cases, tmp_path, options)[0]
    for size, layouts in by_world_size(LOADED).items():
        assert_all_same(run_on_ranks(size, load_cases, tmp_path, layouts), [saved] * len(layouts))


# Precision.


def save_tiers(path: Path) -> dict[str, Any]:
    saved = {}
    for tier, options in TIERS.items():
        model, optimizer = wrapped("mlp", "adamw", {"bucket_mb": 0.005, **options})
        train(model, optimizer, "mlp", range(3))
        zeroopt.checkpoint.save(path / tier, model, optimizer)
        saved[tier] = all_of(model, [optimizer])
    return saved


def load_tiers(path: Path, tiers: list[str]) -> dict[tuple[str, str], Any]:
    """What each tier here makes of the checkpoint of each tier. It then trains on."""
    loaded = {}
    for here in tiers:
        for source in TIERS:
            model, optimizer = wrapped("mlp", "adamw", {"stage": 2, "bucket_mb": 0.003, **TIERS[here]})
            zeroopt.checkpoint.load(path / source, model, optimizer)
            loaded[source, here] = all_of(model, [optimizer])
            train(model, optimizer, "mlp", range(1))
            assert all(bool(param.isfinite().all()) for param in model.parameters())
    return loaded


def rounded(value: Tensor, tier: str) -> Tensor:
    """A parameter as a tier keeps it, in float32."""
    return value.to(BF16).float() if tier == "none" else value.float()


def test_any_precision_loads_any_other(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    saved = run_on_ranks(3, save_tiers, tmp_path)[0]
    for loaded in run_on_ranks(2, load_tiers, tmp_path, list(TIERS)):
        for (source, here), (values, (state,)) in loaded.items():
            source_values, (source_state,) = saved[source]
            for name, value in values.items():
                assert_same(value.float(), rounded(source_values[name], here))
            assert state["param_groups"] == source_state["param_groups"]
            for position, entry in state["state"].items():
                for name, value in entry.items():  # moments are rounded when they are stepped
                    assert_same(value.float(), source_state["state"][position][name].float())
            if source == here:
                assert_same((values, state), (source_values, source_state))


def codes_of(optimizer: zeroopt.ZeroOptimizer) -> dict[str, Tensor]:
    """What this rank keeps, as it keeps it."""
    return {
        f"{position}.{name}": value.clone()
        for position, (_, entry) in enumerate(optimizer.state.items())
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def resume_in_every_tier(path: Path, save: bool) -> list[Any]:
    """What training on gives where numbers are rounded stochastically, kept in 8 bits, or completed by something."""
    results = []
    for tier in ("remainder", "none", "int8", "bfloat16 state"):
        options = {"bucket_mb": 0.002, **TIERS[tier]}
        model, optimizer = wrapped("lm", "adamw", options)
        if save:
            train(model, optimizer, "lm", range(2))
            zeroopt.checkpoint.save(path / tier, model, optimizer)
            again, its_optimizer = wrapped("lm", "adamw", options)
            zeroopt.checkpoint.load(path / tier, again, its_optimizer)
            train(again, its_optimizer, "lm", range(2, 5))
        else:
            zeroopt.checkpoint.load(path / tier, model, optimizer)
        train(model, optimizer, "lm", range(2, 5))
        if save:
            assert_same(codes_of(its_optimizer), codes_of(optimizer))
        results.append(all_of(model, [optimizer]))
    return results


def test_rounding_goes_on_at_other_world_sizes(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    expected = run_on_ranks(2, resume_in_every_tier, tmp_path, True)
    assert_same(expected[0], expected[1])
    for world_size in (1, 2, 4):  # powers of two, so that means of the same gradient are exact
        assert_all_same(run_on_ranks(world_size, resume_in_every_tier, tmp_path, False), expected[0])


# Models and optimizers of all kinds.


class Notes(nn.Module):
    """Saves more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "table": torch.full((2,), float(self.calls))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["table"].tolist() == [state["calls"]] * 2
        self.calls = state["calls"]


class Tally(nn.Module):
    """Saves what is neither a parameter nor a buffer by ways of its own, and an extra state of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.sizes = torch.zeros(9), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sum = self.sum + x.detach().sum(0)
        self.sizes.append(len(x))
        return x

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {f"{prefix}sum": self.sum.clone(), f"{prefix}sizes": list(self.sizes)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.sum, self.sizes = (state_dict.pop(prefix + name) for name in ("sum", "sizes"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> dict[str, Any]:
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing was saved")


class Odd(nn.Module):
    """A frozen layer, one that is never used, a compiled one, no elements, one element, buffers, and whatever else modules save."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(9)
        self.notes = checkpoint_wrapper(Notes())
        self.tally = Tally()
        self.inner = torch.compile(nn.Linear(9, 9), backend="eager")
        self.frozen, self.never = nn.Linear(9, 9).requires_grad_(False), nn.Linear(9, 4)
        self.empty, self.scale = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("mask", torch.arange(9) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.notes(self.norm(self.conv(x)).mean(dim=(2, 3)))
        x = self.tally(x)
        return (self.inner(x) + self.frozen(x)) * self.scale + self.empty.sum()


class Nested(torch.optim.Optimizer):
    """Element-wise, with state in containers, and some that is no tensor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": [0.5, 0.9]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    means = [torch.zeros_like(param) for _ in group["betas"]]
                    state.update(means=means, seen={"steps": 0, "last": torch.zeros_like(param)}, name="nested")
                state["seen"]["steps"] += 1
                for mean, beta in zip(state["means"], group["betas"], strict=True):
                    mean.lerp_(param.grad, 1 - beta)
                    param.sub_(mean, alpha=group["lr"] / state["seen"]["steps"])
                state["seen"]["last"].copy_(param.grad)


def two_optimizers(net: nn.Module) -> list[torch.optim.Optimizer]:
    params = [param for param in net.parameters() if param.requires_grad]
    return [torch.optim.AdamW(params[::2], lr=0.01), torch.optim.SGD(params[1::2], lr=0.1, momentum=0.9)]


def odd(factory: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> Recipe:
    def recipe() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = Odd()
        return net, factory(net)

    return recipe


def whole(factory: Callable[[nn.Module], torch.optim.Optimizer]) -> Recipe:
    def recipe() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = build_whole()
        return net, [factory(net)]

    return recipe


KINDS: dict[str, Recipe] = {
    "AdamW": odd(lambda net: [torch.optim.AdamW(net.parameters(), lr=0.01)]),
    "nested": odd(lambda net: [Nested(net.parameters())]),
    "two": odd(two_optimizers),
    "later": odd(lambda net: [torch.optim.AdamW([net.conv.weight, net.conv.bias], lr=0.01)]),
    **{name: whole(factory) for name, factory in WHOLE_OPTIMIZERS.items()},
}


def make_kind(kind: str, options: dict[str, Any]) -> Wrapped:
    with remembered_grains("kinds", kind):
        model, optimizers = wrap_all(KINDS[kind], **options)
    if kind == "later":
        rest = [*model.module.inner.parameters(), *model.module.notes.parameters(), model.module.scale]
        optimizers[0].add_param_group({"params": rest, "lr": 0.02})
    return model, optimizers


def step_kind(model: nn.Module, optimizers: list[zeroopt.ZeroOptimizer], step: int) -> None:
    if isinstance(model.module, Odd):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        loss_of(model(x)).backward()
    else:
        loss_for(model, step, 0).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def save_kinds(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What each kind has when it is saved, and after one step more."""
    saved = {}
    for kind in KINDS:
        model, optimizers = make_kind(kind, options)
        for step in range(2):
            step_kind(model, optimizers, step)
        zeroopt.checkpoint.save(path / kind, model, optimizers)
        before = all_of(model, optimizers)
        step_kind(model, optimizers, 2)
        saved[kind] = before, all_of(model, optimizers)
    return saved


def check_memory_formats(optimizers: list[zeroopt.ZeroOptimizer]) -> None:
    """State of a whole parameter lies in memory as the parameter does: products of transposed matrices may have other bits."""
    for optimizer in optimizers:
        for param, entry in optimizer.state.items():
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    assert value.stride() == param.stride(), name


def load_kinds(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    loaded = {}
    for kind in KINDS:
        model, optimizers = make_kind(kind, options)
        zeroopt.checkpoint.load(path / kind, model, optimizers)
        check_memory_formats(optimizers)
        before = all_of(model, optimizers)
        if isinstance(model.module, Odd):
            assert model.module.notes.calls == 2 * 2  # backward calls it again
            tally = model.module.tally
            assert tally.sizes == [4, 4] and tally.sum.any()
            keys = open_checkpoint(path / kind).metadata.state_dict_metadata
            assert not any("_orig_mod" in key or "_checkpoint_wrapped" in key for key in keys)
        step_kind(model, optimizers, 2)
        loaded[kind] = before, all_of(model, optimizers)
    return loaded


def test_models_and_optimizers_of_all_kinds(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """Means over 1, 2 and 4 ranks of the same gradient are exact, so training goes on with the same bits."""
    saved = run_on_ranks(2, save_kinds, tmp_path, {"bucket_mb": 0.001, "fused": False})[0]
    for world_size, options in (
        (1, {"fused": False}),
        (2, {"stage": 0, "fused": False}),
        (2, {"share_parameters": True, "fused": False}),
        (4, {"stage": 1, "fused": False, "transport": "pairwise"}),
    ):
        assert_all_same(run_on_ranks(world_size, load_kinds, tmp_path, options), saved)
