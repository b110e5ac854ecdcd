"""What `python -m zeroopt checkpoint inspect` and `export` print and return."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from written_checkpoints import write

import zeroopt
from zeroopt.__main__ import main
from zeroopt.checkpoint import inspection
from zeroopt.checkpoint.format.writing import write_checkpoint
from zeroopt.checkpoint.inspection import inspect


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["zeroopt", *map(str, arguments)])
    return main()


def test_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 3)
    assert run(monkeypatch, "checkpoint", "inspect", tmp_path / "a") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"checkpoint {tmp_path / 'a'}"
    assert lines[1].startswith(f"written by zeroopt {zeroopt.__version__}, torch {torch.__version__}, 20")
    for line in [
        "version: 3",
        "steps 3 (1 parameters)",
        "model.weight 5 x 7 float32 140 B",
        "optimizer.state.weight.step scalar float32 4 B",
        "optimizer.param_groups.0.betas (0.9, 0.99)",
        "model 1 35 140 B",
        "optimizer 2 36 144 B",
        "all files are as they were written",
    ]:
        assert line in lines


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", 3)
    assert run(monkeypatch, "checkpoint", "inspect", tmp_path / "a", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["facts"] == {"version": 3}
    assert report["steps"] == {"3": 1}
    assert report["values"]["optimizer.param_groups.0.betas"] == [0.9, 0.99]
    assert report["totals"]["optimizer"] == {"tensors": 2, "elements": 36, "bytes": 144}
    assert report["problems"] == []
    assert {"key": "model.weight", "shape": [5, 7], "dtype": "float32", "bytes": 140, "parts": 1} in report["tensors"]
    assert set(report["files"]) == {".metadata", "__0_0.distcp", "rank0.pt"}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rank0.pt", "zeroopt.json"])
@pytest.mark.parametrize("missing", [True, False])
def test_damage_is_named(
    name: str, missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 3)
    file = tmp_path / "a" / name
    if missing:
        file.unlink()
    else:
        file.write_bytes(b"\0" * file.stat().st_size)
    if name == "zeroopt.json" and missing:  # then it is one of DCP alone
        assert run(monkeypatch, "checkpoint", "inspect", tmp_path / "a") == 0
        assert "all files are there; they have no checksums" in capsys.readouterr().out
        return
    assert run(monkeypatch, "checkpoint", "inspect", tmp_path / "a") == 1
    damage = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("DAMAGED: ", "cannot be opened: "))
    ]
    assert len(damage) == 1
    assert name in damage[0]
    assert run(monkeypatch, "checkpoint", "inspect", tmp_path / "a", "--json") == 1
    assert name in json.loads(capsys.readouterr().out)["problems"][0]


def test_steps_are_counted_whatever_they_are(tmp_path: Path) -> None:
    steps = {"a": torch.tensor(3.0), "b": 7, "c": torch.tensor(7), "d": torch.tensor([1.0])}
    state = {name: {"step": step, "exp_avg": torch.ones(2)} for name, step in steps.items()}
    write_checkpoint(tmp_path / "a", {"optimizer": {"state": state}}, {}, {}, None)
    report = inspect(tmp_path / "a")
    assert report.problems == []
    assert report.steps == {3: 1, 7: 2}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_of_dcp_alone(tmp_path: Path) -> None:
    dcp.save({"model": {"a": torch.ones(2, 3, dtype=torch.bfloat16)}}, checkpoint_id=tmp_path / "a")
    report = inspect(tmp_path / "a")
    assert (report.written_by, report.facts, report.problems) == (None, None, [])
    assert [(entry.key, entry.shape, entry.dtype, entry.bytes) for entry in report.tensors] == [
        ("model.a", [2, 3], "bfloat16", 12)
    ]


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", 3)
    arguments = ["checkpoint", "export", tmp_path / "a", "--to", tmp_path / "torch.pt"]
    assert run(monkeypatch, *arguments) == 0
    assert torch.load(tmp_path / "torch.pt", weights_only=True)["optimizer"]["state"][0]["step"] == 3
    assert run(monkeypatch, *arguments) == 1
    target = os.path.realpath(tmp_path / "torch.pt")
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {target} exists already. Choose another name, or remove it\n")


def inside_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def laughs() -> list[Any]:
    """Few lists, each with the one before ten times."""
    value: list[Any] = []
    for _ in range(20):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a": {"step": torch.tensor(float("nan"))}},
            "1 parameters have taken a number of steps that is none, such as nan",
        ),
        ({"a": {"step": float("inf")}}, "such as inf"),
        ({"a": {"step": (inside_itself(),)}}, "more than 100 containers in each other"),
        ({"a": {"step": (laughs(),)}}, "more than 1000 values in it"),
    ],
    ids=["nan", "infinite", "in itself", "laughs"],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_odd_values_are_told(state: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_SHOWN_VALUES", 1000)
    dcp.save({"optimizer": {"state": state}}, checkpoint_id=tmp_path / "a")
    (problem,) = inspect(tmp_path / "a").problems
    assert message in problem
