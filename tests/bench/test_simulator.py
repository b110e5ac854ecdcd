"""What is simulated beside what is measured, and predictions: that they run, and write what they have found."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.simulator import Row
from zeroopt.simulator import Machine

MACHINE = Machine(host_ranks=1, flops=1e10, memory_bandwidth=1e10, cores=2)


def report_of(monkeypatch: pytest.MonkeyPatch, path: Path, module: str, *options: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [module, *options, f"--out={path}"])
    assert importlib.import_module(f"bench.{module}").main() == 0
    report: dict[str, Any] = json.loads(path.read_text())
    return report


@pytest.mark.slow
def test_steps_are_simulated_and_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.simulator.measure", lambda *args, **options: MACHINE)
    sizes = ("--layers=1", "--width=64", "--tokens=16", "--steps=1", "--windows=1", "--world-sizes", "2", "--links")
    report = report_of(monkeypatch, tmp_path / "rows.json", "simulator", *sizes, "--methods", "DDP", "zeroopt stage 2")
    assert [(row["where"], row["ranks"], row["method"]) for row in report["rows"]] == [
        ("this machine", 2, "DDP"),
        ("this machine", 2, "zeroopt stage 2"),
    ]
    for row in report["rows"]:
        assert row["error"] == pytest.approx(row["simulated_s"] / row["measured_s"] - 1)


def test_what_has_failed_has_no_error() -> None:
    assert Row("here", 2, "DDP", 1.0, None, 0.0, None).error is None
    assert Row("here", 2, "DDP", 1.1, 1.0, 0.0, None).error == pytest.approx(0.1)


def test_predictions_are_made_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scale = importlib.import_module("bench.scale")
    monkeypatch.setattr(scale, "MODELS", {"small": scale.Model(2e6), "in parts": scale.Model(8e6, parts=8)})
    monkeypatch.setattr(scale, "TOKENS", 32)
    options = ("--models", "small", "in parts", "--gpus", "8", "64", "--buckets-mb", "1", f"--plots={tmp_path}")
    rows = report_of(monkeypatch, tmp_path / "rows.json", "scale", *options)["rows"]
    assert len(rows) == 2 * 2 * len(scale.METHODS)
    steps = {(row["model"], row["gpus"], row["method"]): row["step"] for row in rows}
    assert steps["in parts", 64, "DDP"]["world_size"] == 8
    flat, levels = (steps["small", 64, f"ZeRO-2, {name}"]["step_s"] for name in ("flat ring", "two levels"))
    assert levels < flat
    for name in ("scale-by-ranks.png", "scale-by-bucket.png"):
        assert (tmp_path / name).stat().st_size > 0
