"""Exported checkpoints are what torch.save of a plain model and optimizer would have written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from measure import peak_rss_bytes, reset_peak_rss, rss_bytes, run_fresh
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from written_checkpoints import write

from zeroopt import CheckpointError
from zeroopt.checkpoint.exporting import by_number, export
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.format.writing import write_checkpoint


def trained(optimizer_class: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with an unused parameter and a buffer, in param_groups of another order."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16(), nn.Linear(1, 1))
    groups = [
        {"params": list(model[2].parameters())},
        {"params": [*model[0].parameters(), *model[3].parameters()], "lr": 0.3},
    ]
    optimizer = optimizer_class([*groups, {"params": list(model[1].parameters())}], lr=0.1, **options)
    for _ in range(2):
        model[2](model[1](model[0](torch.randn(5, 3))).bfloat16()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected) or isinstance(expected, dict)
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert set(got) == set(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got == expected


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(torch.optim.AdamW, {"amsgrad": True}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {})],
    ids=["AdamW", "SGD with momentum", "SGD"],
)
@pytest.mark.parametrize("by_dcp", [False, True], ids=["of zeroopt", "of DCP"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_torch_goes_on_from_an_export(by_dcp: bool, optimizer_class: Any, options: Any, tmp_path: Path) -> None:
    model, optimizer = trained(optimizer_class, **options)
    parts = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if by_dcp:
        dcp.save(parts, checkpoint_id=tmp_path / "a")
    else:
        write_checkpoint(tmp_path / "a", parts, {}, {}, None)
    export(open_checkpoint(tmp_path / "a"), tmp_path / "torch.pt")
    loaded = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert_same(loaded["model"], dict(model.state_dict()))
    expected = optimizer.state_dict()
    # get_optimizer_state_dict makes a step for whoever has none: what it leaves of that is its business
    for number in set(loaded["optimizer"]["state"]) - set(expected["state"]):
        del loaded["optimizer"]["state"][number]
    assert_same(loaded["optimizer"], expected)
    fresh_model, fresh_optimizer = trained(optimizer_class, **options)
    fresh_model.load_state_dict(loaded["model"])
    fresh_optimizer.load_state_dict(loaded["optimizer"])


def test_nothing_is_exported_over_or_into_anything(tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    checkpoint = open_checkpoint(tmp_path / "a")
    (tmp_path / "torch.pt").write_text("mine")
    for name, message in [
        ("torch.pt", "exists already"),
        ("a/torch.pt", "would be in the checkpoint"),
        ("none/torch.pt", "cannot write .*none/torch.pt: No such file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            export(checkpoint, tmp_path / name)
    assert (tmp_path / "torch.pt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a", "torch.pt"]
    checkpoint.verify(None)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    content = (tmp_path / "a" / "__0_0.distcp").read_bytes()
    (tmp_path / "a" / "__0_0.distcp").write_bytes(content[:-1] + b"x")
    with pytest.raises(CheckpointError, match="__0_0.distcp is damaged"):
        export(open_checkpoint(tmp_path / "a"), tmp_path / "torch.pt")
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="cannot write .*torch.pt: No space left on device"):
        export(open_checkpoint(tmp_path / "a"), tmp_path / "torch.pt")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"state": {}}, "no param_groups that name"),
        ({"param_groups": {"weight": {"lr": 1}}}, "no param_groups that name"),
        (
            {"state": {"b": {}}, "param_groups": [{"params": ["a"]}]},
            "state of 'b', which is in none of the param_groups",
        ),
    ],
)
def test_an_optimizer_without_order_is_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        by_number(optimizer)


NUMEL, TENSORS = 9 << 20, 5  # of 36 MiB: malloc gives so much back at once


def peak_of_export(path: Path) -> float:
    """Highest memory above that before, in tensors."""
    write_checkpoint(
        path / "a",
        {"model": {f"{number}": torch.full((NUMEL,), float(number)) for number in range(TENSORS)}},
        {},
        {},
        None,
    )
    checkpoint = open_checkpoint(path / "a")
    before = rss_bytes()
    reset_peak_rss()
    export(checkpoint, path / "torch.pt")
    peak = (peak_rss_bytes() - before) / (4 * NUMEL)
    loaded = torch.load(path / "torch.pt", weights_only=True, mmap=True)["model"]
    assert [loaded[f"{number}"][-1].item() for number in range(TENSORS)] == list(range(TENSORS))
    return peak


@pytest.mark.slow
def test_tensors_go_through_memory_one_after_the_other(tmp_path: Path) -> None:
    [peak] = run_fresh(1, peak_of_export, tmp_path)
    assert peak < 2.3  # as it was saved, and as it is exported


@pytest.mark.parametrize(
    ("parts", "paths"),
    [
        ({"optimizer": 3, "model": torch.ones(1)}, None),
        ({"optimizer": {"param_groups": [3], "state": {}}}, None),
        ({"optimizer": {"param_groups": [{"params": [[1]]}], "state": {}}}, None),
        ({"optimizer": {"param_groups": [{"params": [1]}], "state": 3}}, None),
        ({"a": {"b": 1, "c": 2}}, {"a.b": ("a",), "a.c": ("a", "c")}),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_fits_nowhere_is_refused_or_as_it_is(parts: Any, paths: Any, tmp_path: Path) -> None:
    dcp.save(parts, checkpoint_id=tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    checkpoint.metadata.planner_data = paths or checkpoint.metadata.planner_data
    if parts.get("optimizer") == 3:
        export(checkpoint, tmp_path / "torch.pt")
        assert torch.load(tmp_path / "torch.pt", weights_only=True)["optimizer"] == 3
        return
    with pytest.raises(CheckpointError):
        export(checkpoint, tmp_path / "torch.pt")
    assert os.listdir(tmp_path) == ["a"]
