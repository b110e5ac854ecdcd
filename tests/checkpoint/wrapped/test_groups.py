"""Options of param_groups are found again, of groups without parameters too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Recipe, assert_same, wrap_all
from torch import nn
from worker_pool import RunOnRanks

import zeroopt.checkpoint
from zeroopt.checkpoint.exporting import export
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.inspection import inspect

# Each a group: the parameters that it has, and its rate.
Groups = Sequence[tuple[str, float]]


def net_with(*optimizers: Groups) -> Recipe:
    """Parameters a, b, … by the letters that the groups have."""

    def recipe() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        letters = sorted(letter for groups in optimizers for of_group, _ in groups for letter in of_group)
        net = nn.ParameterDict({letter: nn.Parameter(torch.ones(5)) for letter in letters})
        return net, [
            torch.optim.AdamW([{"params": [net[letter] for letter in of_group], "lr": lr} for of_group, lr in groups])
            for groups in optimizers
        ]

    return recipe


def save_and_load(
    path: Path, saved: Sequence[Groups], here: Sequence[Groups], options: dict[str, Any]
) -> list[list[float]]:
    """The rates after loading into optimizers whose groups are all of rate 9."""
    model, optimizers = wrap_all(net_with(*saved))
    zeroopt.checkpoint.async_save(path, model, optimizers).result()
    other, its_optimizers = wrap_all(net_with(*([(letters, 9.0) for letters, _ in groups] for groups in here)))
    zeroopt.checkpoint.load(path, other, its_optimizers, **options)
    return [[group["lr"] for group in optimizer.param_groups] for optimizer in its_optimizers]


CASES: dict[str, tuple[Sequence[Groups], Sequence[Groups], list[list[float]]]] = {
    "one": ([[("a", 1.0), ("", 2.0)]], [[("a", 0), ("", 0)]], [[1.0, 2.0]]),
    "first": ([[("", 2.0), ("a", 1.0)]], [[("", 0), ("a", 0)]], [[2.0, 1.0]]),
    "several": (
        [[("", 1.0), ("a", 2.0), ("", 3.0), ("", 4.0), ("b", 5.0)]],
        [[("", 0), ("a", 0), ("", 0), ("", 0), ("b", 0)]],
        [[1.0, 2.0, 3.0, 4.0, 5.0]],
    ),
    "of two optimizers": (
        [[("a", 1.0), ("", 2.0)], [("", 3.0), ("b", 4.0), ("", 5.0)]],
        [[("a", 0), ("", 0)], [("", 0), ("b", 0), ("", 0)]],
        [[1.0, 2.0], [3.0, 4.0, 5.0]],
    ),
    "elsewhere, but the only one": ([[("a", 1.0), ("", 2.0), ("b", 1.0)]], [[("", 0), ("ab", 0)]], [[2.0, 1.0]]),
    "not saved": ([[("a", 1.0)]], [[("a", 0), ("", 0)]], [[1.0, 9.0]]),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_without_parameters(run_on_ranks: RunOnRanks, tmp_path: Path, case: str) -> None:
    saved, here, expected = CASES[case]
    for rates in run_on_ranks(2, save_and_load, tmp_path / "x", saved, here, {}):
        assert rates == expected


def test_what_cannot_be_told_is_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    saved = [[("a", 1.0), ("", 2.0), ("b", 1.0), ("", 3.0)]]
    outcomes = run_on_ranks.outcomes(2, save_and_load, tmp_path / "x", saved, [[("", 0), ("ab", 0)]], {})
    for outcome in outcomes:
        assert "param_group 0 has no parameters, and the checkpoint has 2 such groups of different options" in str(
            outcome
        )


def test_options_stay_where_no_parameter_was_saved(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    saved, here = [[("a", 1.0)]], [[("a", 0), ("b", 0)]]
    for rates in run_on_ranks(2, save_and_load, tmp_path / "x", saved, here, {"strict": False}):
        assert rates == [[1.0, 9.0]]


def save_empty(path: Path) -> None:
    model, optimizers = wrap_all(net_with([("a", 1.0), ("", 2.0)]))
    zeroopt.checkpoint.save(path, model, optimizers)


def test_they_are_shown_and_exported(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, save_empty, tmp_path / "x")
    values = inspect(tmp_path / "x").values
    assert values["optimizer.param_groups.1.lr"] == 2.0 and values["optimizer.param_groups.1.params"] == []
    export(open_checkpoint(tmp_path / "x"), tmp_path / "x.pt")
    exported = torch.load(tmp_path / "x.pt", weights_only=True)
    net, (plain,) = net_with([("a", 0.0), ("", 0.0)])()
    plain.load_state_dict(exported["optimizer"])
    assert [group["lr"] for group in plain.param_groups] == [1.0, 2.0]
    net.load_state_dict(exported["model"])
    assert_same(dict(net.named_parameters()), {"a": torch.ones(5)})
