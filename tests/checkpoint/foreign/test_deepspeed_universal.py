"""A universal checkpoint is read parameter by parameter, in their shapes, or the file at fault is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_files import LR, change, write_model, write_universal

from zeroopt.checkpoint.foreign.deepspeed_universal import UniversalFiles
from zeroopt.errors import NotSupportedError, StateError

GROUPS = [
    {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.arange(10.0, 15.0)},
    {"scale": torch.tensor(7.0), "nothing": torch.zeros(0, 3)},
]
COMMON = Path("zero", "optimizer_state.pt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_universal(tmp_path, GROUPS)
    return tmp_path


def test_it_is_known_by_its_directory(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    assert UniversalFiles.is_in(folder) and not UniversalFiles.is_in(other)
    (other / "zero").touch()
    assert not UniversalFiles.is_in(other)


def test_what_was_written_is_read(folder: Path) -> None:
    files = UniversalFiles(folder)
    assert files.options == [{"lr": LR}] * 2
    for group in GROUPS:
        for name, param in group.items():
            assert torch.equal(files.master(name), param)
            state = files.state(name)
            assert list(state) == ["exp_avg", "step"] and torch.equal(state["exp_avg"], 2 * param)
            assert torch.equal(state["step"], torch.tensor(3.0))


def test_flat_tensors_get_the_shape_of_their_parameter(folder: Path) -> None:
    torch.save({"param": torch.arange(6.0)}, folder / "zero" / "a.weight" / "fp32.pt")
    assert torch.equal(UniversalFiles(folder).master("a.weight"), GROUPS[0]["a.weight"])


def test_options_may_be_missing(folder: Path) -> None:
    torch.save({}, folder / COMMON)
    assert UniversalFiles(folder).options is None


def test_files_are_opened_when_they_are_asked_for(folder: Path) -> None:
    files = UniversalFiles(folder)
    (folder / "zero" / "scale" / "fp32.pt").unlink()
    assert torch.equal(files.master("a.bias"), GROUPS[0]["a.bias"])
    with pytest.raises(StateError, match=r"no file .*scale.fp32.pt"):
        files.master("scale")


def test_a_parameter_may_have_no_state(folder: Path) -> None:
    for name in ("exp_avg", "step"):
        (folder / "zero" / "scale" / f"{name}.pt").unlink()
    assert UniversalFiles(folder).state("scale") == {}


def test_a_state_that_the_others_have_is_missed(folder: Path) -> None:
    (folder / "zero" / "a.bias" / "exp_avg.pt").unlink()
    expected = r"a.bias has files of \['step'\], those of other parameters are of \['exp_avg', 'step'\]"
    with pytest.raises(StateError, match=expected):
        UniversalFiles(folder).state("a.bias")


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.zeros(2, 2), r"a tensor of shape \[2, 2\]"), ([1.0] * 6, r"\[1.0, ")],
    ids=["fewer", "list"],
)
def test_what_is_no_such_tensor_is_refused(folder: Path, value: Any, found: str) -> None:
    change(folder / "zero" / "a.weight" / "exp_avg.pt", "param", value=value)
    with pytest.raises(StateError, match=f"exp_avg.pt holds {found}.*, expected 6 elements of parameter 'a.weight'"):
        UniversalFiles(folder).state("a.weight")


def test_a_file_without_its_tensor_is_of_no_known_layout(folder: Path) -> None:
    torch.save({"other": 1}, folder / "zero" / "scale" / "fp32.pt")
    with pytest.raises(StateError, match=r"fp32.pt, written by DeepSpeed .* has no 'param'"):
        UniversalFiles(folder).master("scale")


@pytest.mark.parametrize("missing", [COMMON, Path("mp_rank_00_model_states.pt")], ids=str)
def test_a_missing_file_of_all_is_named(folder: Path, missing: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(StateError, match=f"no file .*{missing.name}"):
        UniversalFiles(folder)


def test_stage_3_and_split_models_are_refused(folder: Path) -> None:
    change(folder / COMMON, "zero_stage", value=3)
    with pytest.raises(NotSupportedError, match="optimizer_state.pt is of ZeRO stage 3"):
        UniversalFiles(folder)
    change(folder / COMMON, "zero_stage", value=2)
    write_model(folder, GROUPS, mp_world_size=2)
    with pytest.raises(NotSupportedError, match="split over ranks"):
        UniversalFiles(folder)
