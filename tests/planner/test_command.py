"""`python -m zeroopt estimate` tells what `estimate_memory` does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zeroopt import estimate_memory
from zeroopt.__main__ import main
from zeroopt.planner.command import _number, _size
from zeroopt.planner.transformer import transformer_of


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["zeroopt", "estimate", *map(str, arguments)])
    return main()


TINY = ("--layers", 2, "--width", 128, "--vocabulary", 256, "--world-size", 4)


def test_a_transformer_of_some_size_is_estimated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tokens", 32, "--option", "stage=1", "--option", "state_dtype=int8", "--option", "overlap=False")
    assert run(monkeypatch, *TINY, *options, "--alone", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    expected = estimate_memory(
        transformer_of(0, layers=2, width=128, vocabulary=256),
        torch.optim.AdamW,
        world_size=4,
        tokens=32,
        compare=False,
        stage=1,
        state_dtype=torch.int8,
        overlap=False,
    )
    assert told == expected.as_json()


def test_outer_steps_are_estimated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outer = ("--option", "average_every=10", "--option", "outer_optimizer=SGD", "--option", "outer_dtype=int8")
    assert run(monkeypatch, *TINY, "--groups", 2, *outer, "--alone", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    phases = told["asked"]["phases"]
    # On each of four ranks an anchor, of which half is kept exactly, and three of its buckets as float32 at most.
    own = phases["step"]["parameters"] // 4
    assert 1.5 * own <= phases["step"]["outer"] <= 2.6 * own + 4 * 256 * told["asked"]["buckets"]


def make() -> tuple[nn.Module, torch.Tensor]:
    """A model, and what it is called with."""
    return nn.Linear(16, 16), torch.empty(3, 16)


def make_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def test_a_model_and_an_optimizer_of_ones_own_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_model.py").write_text(Path(__file__).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    where = ("--model", "own_model:make", "--optimizer", "own_model:make_sgd", "--world-size", 2)
    assert run(monkeypatch, *where, "--json", "--alone") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == 16 * 16 + 16 and told["knows_activations"]
    assert told["asked"]["phases"]["step"]["state"] < 4 * told["parameters"]


def test_the_exit_code_says_whether_it_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *TINY, "--alone", "--memory", "80GB") == 0
    assert run(monkeypatch, *TINY, "--alone", "--memory", "1MB") == 1
    assert "No options" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--world-size", 4), "expected --model, --params, or --layers and --width"),
        (("--model", "nowhere", "--world-size", 4), "expected --model to be module:function, got 'nowhere'"),
        (("--model", "nowhere:f", "--world-size", 4), "--model nowhere:f: No module named 'nowhere'"),
        (("--model", "os:getcwd", "--world-size", 4), "expected os:getcwd to return a torch.nn.Module, got str"),
        ((*TINY, "--optimizer", "Adamant"), "expected --optimizer to be a class of"),
        ((*TINY, "--option", "stage"), "expected an option as name=value, got 'stage'"),
        ((*TINY, "--option", "state_dtype=int4"), "expected state_dtype to be one of"),
        ((*TINY, "--option", "stage=5"), "expected stage to be one of"),
        (("--params", "many", "--world-size", 4), "expected a number such as"),
        ((*TINY, "--memory", "much"), "expected a number such as"),
        ((*TINY, "--memory", "nan"), "expected a number such as"),
        ((*TINY, "--width", -64), "expected --width to be positive, got -64"),
        ((*TINY, "--tokens", -1), "expected tokens and batch to be positive, got -1 and 1"),
        ((*TINY, "--option", "transport=foo"), "expected transport to be one of 'auto', 'torch'"),
        ((*TINY, "--option", "norm_group=1"), "can be given as text (stage, "),
        ((*TINY, "--option", "tokens=8"), "got 'tokens'"),
        ((*TINY, "--optimizer", "lr_scheduler"), "expected --optimizer to be a class"),
        ((*TINY, "--optimizer", "Optimizer"), "--optimizer Optimizer makes none of all parameters alone (TypeError"),
        (
            (*TINY, "--optimizer", "builtins:list"),
            "expected optimizer to make an optimizer of a list of parameters, got a list",
        ),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: tuple[Any, ...], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run(monkeypatch, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_sizes_have_units() -> None:
    assert [_number(text) for text in ("17e9", "1.5B", "350m", "2T")] == [17e9, 1.5e9, 350e6, 2e12]
    assert [_size(text) for text in ("80GB", "1GiB", "512MiB", "8e10")] == [80e9, 2**30, 2**29, 8e10]
