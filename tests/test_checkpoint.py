"""zeroopt.checkpoint: what is saved is what is loaded, at any world size, stage, bucket size and precision."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    BF16,
    TIERS,
    all_of,
    assert_all_same,
    assert_same,
    train,
    wrapped,
)
from torch import Tensor
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint

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
