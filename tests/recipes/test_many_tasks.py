"""One trunk learns several tasks, the same by DDP and by zeroopt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from recipe_runs import run_recipe
from worker_pool import RunOnRanks

from recipes.digits import Digits
from recipes.many_tasks.model import ManyHeads
from recipes.many_tasks.presets import PRESETS
from recipes.outcome import Outcome, differences
from recipes.side_by_side import FIRST_TOLERANCE, LAST_TOLERANCE

STEPS = 120


@pytest.mark.slow
def test_it_learns_the_same_by_both_methods(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    ddp, zeroopt = (
        run_on_ranks(2, run_recipe, "many_tasks", method, tmp_path, f"--steps={STEPS}")[0]
        for method in ("ddp", "zeroopt")
    )
    first, last = differences(ddp, zeroopt)
    assert first <= FIRST_TOLERANCE and last <= LAST_TOLERANCE
    for outcome in (ddp, zeroopt):  # reading takes longer
        figures = {figure.name: figure for figure in outcome.figures}
        assert len(figures) == 4
        assert figures["turn: accuracy"].learned and figures["restore: error"].learned, list(map(str, figures.values()))


def run_in_bfloat16(method: str, out: Path) -> Outcome:
    preset = replace(PRESETS["tiny"], layers=1, bfloat16=True, recomputed=True)
    with patch.dict(PRESETS, tiny=preset):
        return run_recipe("many_tasks", method, out, "--steps=4")


def test_real_sizes_train_in_bfloat16(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    ddp, zeroopt = (run_on_ranks(2, run_in_bfloat16, method, tmp_path)[0] for method in ("ddp", "zeroopt"))
    assert zeroopt.losses["training"] == pytest.approx(ddp.losses["training"], rel=0.05)


def pose(name: str, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of white squares, and what is asked of them."""
    model: ManyHeads = PRESETS["tiny"].make()
    (task,) = (task for task in model.tasks if task.name == name)
    squares = Digits(torch.ones(count, 1, 8, 8), torch.arange(count) % 10)
    pictures, targets = task.pose(squares, torch.Generator().manual_seed(0))
    assert pictures.shape == (count, 1, 16, 16)
    assert model(pictures, name).shape[0] == count
    assert task.loss(model(pictures, name), targets).isfinite()
    guess = task.guess(targets)
    assert guess.shape == model(pictures, name).shape and task.score(guess, targets).isfinite()
    return pictures, targets


def test_where_a_digit_is() -> None:
    pictures, targets = pose("find")
    centres = (torch.arange(16) + 0.5) / 8 - 1
    light = pictures[:, 0] / pictures.sum((1, 2, 3))[:, None, None]
    assert torch.allclose((light * centres).sum((1, 2)), targets[:, 0], atol=0.05)
    assert torch.allclose((light * centres[:, None]).sum((1, 2)), targets[:, 1], atol=0.05)
    assert torch.allclose(pictures.sum((1, 2, 3)).sqrt() / 16, targets[:, 2], atol=0.05)


def test_half_of_the_patches_are_to_be_restored() -> None:
    pictures, targets = pose("restore")
    covered = ~targets.isnan()
    assert targets.shape == (40, 16, 16) and covered.any(2).sum(1).eq(8).all()
    assert (pictures == 0.5).sum((1, 2, 3)).ge(8 * 16).all()


@pytest.mark.parametrize(("name", "choices"), [("read", 10), ("turn", 4)])
def test_what_can_be_chosen(name: str, choices: int) -> None:
    _, targets = pose(name)
    assert set(targets.tolist()) == set(range(choices))


@pytest.mark.parametrize(("preset", "millions"), {"vit-b": 88, "vit-l": 308, "vit-h": 637, "vit-g": 1_600}.items())
def test_presets_are_of_their_size(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model, _ = PRESETS[preset]()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
