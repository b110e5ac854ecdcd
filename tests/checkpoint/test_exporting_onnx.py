"""A checkpoint becomes an ONNX file, and onnxruntime computes with it what torch does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import TIERS, same_batch, wrapped
from torch import Tensor, nn
from training import TinyLm, loss_of
from worker_pool import RunOnRanks

import zeroopt.checkpoint
from zeroopt import CheckpointError, ConfigError
from zeroopt.__main__ import main
from zeroopt.checkpoint import exporting_onnx
from zeroopt.checkpoint.exporting_onnx import export_onnx, read_model
from zeroopt.checkpoint.saved_model import open_saved

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def make() -> tuple[nn.Module, Tensor, Any]:
    """A language model, tokens, and that there may be more or fewer sequences of them."""
    return TinyLm(), torch.zeros(2, 6, dtype=torch.int64), ({0: torch.export.Dim("batch")},)


def save_trained(path: Path, tier: str) -> tuple[dict[str, Tensor], Tensor]:
    """Train and save. Returns parameters as exact as they are kept, and what they make of a batch."""
    model, optimizer = wrapped("lm", "adamw", TIERS[tier])
    for step in range(3):
        loss_of(model(same_batch("lm", step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    zeroopt.checkpoint.save(path, model, optimizer)
    plain = TinyLm()
    plain.load_state_dict({name: optimizer.full_parameter(p) for name, p in model.named_parameters()}, strict=False)
    return {name: p.detach() for name, p in plain.named_parameters()}, plain(same_batch("lm", 0)).detach()


def is_same(value: Tensor, other: Tensor) -> bool:
    """To the bit; a matrix may have been transposed."""
    return torch.equal(value, other) or torch.equal(value.mT if value.dim() == 2 else value, other)


def test_a_checkpoint_of_16_bits_leaves_as_exact_as_it_was_kept(
    run_on_ranks: RunOnRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDED:
        pytest.importorskip(package, reason="ONNX needs it")
    from onnx_files import run_onnx, values_in

    exact, expected = run_on_ranks(2, save_trained, tmp_path / "run", "remainder")[0]
    file = tmp_path / "model.onnx"
    arguments = ("checkpoint", "export", tmp_path / "run", "--to", file, "--model", f"{__name__}:make")
    monkeypatch.setattr(sys, "argv", ["zeroopt", *map(str, arguments)])
    assert main() == 0
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "run"]
    inside = values_in(file)
    assert [name for name, value in exact.items() if not any(is_same(value, one) for one in inside)] == []
    torch.testing.assert_close(run_onnx(file, same_batch("lm", 0)), expected)


def test_a_large_model_has_its_values_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDED:
        pytest.importorskip(package, reason="ONNX needs it")
    from onnx_files import run_onnx

    torch.manual_seed(3)
    model = nn.Linear(64, 8)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "run")
    monkeypatch.setattr(exporting_onnx, "ONE_FILE_BYTES", 100)
    export_onnx(tmp_path / "run", tmp_path / "model.onnx", lambda: (nn.Linear(64, 8), {"input": torch.zeros(3, 64)}))
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data", "run"]
    assert (tmp_path / "model.onnx.data").stat().st_size >= 4 * 64 * 8
    x = torch.randn(3, 64)
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), model(x).detach())
    for gone in ("model.onnx", "run"):  # what lies beside one that is gone is not overwritten either
        with pytest.raises(CheckpointError, match=r"model\.onnx(\.data)? exists already"):
            export_onnx(tmp_path / gone, tmp_path / "model.onnx", make)
        (tmp_path / "model.onnx").unlink(missing_ok=True)


def test_values_of_another_model_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    dcp.save({"model": nn.Linear(4, 3).state_dict()}, checkpoint_id=tmp_path / "run")
    for model, message in [
        (nn.Linear(4, 3, bias=False), "it lacks nothing, and the model lacks 'bias'"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "it lacks '0.weight' and 6 more"),
        (nn.Linear(3, 4), r"'weight' is of shape \[4, 3\] in the model, and of shape \[3, 4\]"),
    ]:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            read_model(open_saved(tmp_path / "run", model), model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_values_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(3)
    saved, model = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    saved(torch.randn(4, 5))
    dcp.save({"model": saved.state_dict()}, checkpoint_id=tmp_path / "run")
    read_model(open_saved(tmp_path / "run", model), model)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("made", "told"),
    [(nn.Linear(1, 1), "got Linear"), ((nn.Linear(1, 1),), "got a tuple of 1"), ((1, 2), "a tuple of 2")],
)
def test_what_makes_no_model_with_inputs_is_refused(
    made: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting_onnx, "check_has_exporter", lambda: None)
    with pytest.raises(ConfigError, match=f"expected a model to export as .*{told}"):
        export_onnx(tmp_path / "run", tmp_path / "model.onnx", lambda: made)


def test_without_packages_it_is_said_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match="pip install onnx"):
        export_onnx(tmp_path / "run", tmp_path / "model.onnx", make)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--to", "model.onnx"), "expected --model"),
        (("--to", "model.pt", "--model", "a:b"), "--model is for a file that ends in .onnx"),
        (("--to", "model.onnx", "--model", "nowhere"), "expected --model to be module:function, got 'nowhere'"),
    ],
)
def test_options_that_do_not_fit_are_told(
    options: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["zeroopt", "checkpoint", "export", "run", *options])
    assert main() == 1
    assert told in capsys.readouterr().err
