"""Parameters and states are put together from the partitions of all ranks, however they were cut, or the file at fault is named."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from deepspeed_files import LR, VERSION, change, model_path, rank_path, write_model, write_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zeroopt.checkpoint.foreign.deepspeed_ranks import ModelFile, RankFiles, check_stage, entry
from zeroopt.checkpoint.foreign.inert_pickle import StandIn
from zeroopt.errors import NotSupportedError, StateError

SAVED = "optimizer_state_dict"
BASE = "base_optimizer_state"
GROUPS = [{"a": torch.arange(6.0).view(2, 3), "b": torch.arange(10.0, 15.0)}, {"c": torch.tensor(7.0)}]

shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)


def numbered(all_shapes: list[list[tuple[int, ...]]]) -> list[dict[str, Tensor]]:
    """Groups of parameters that differ in all their elements."""
    groups: list[dict[str, Tensor]] = []
    count = 0
    for number, group in enumerate(all_shapes):
        groups.append({})
        for place, shape in enumerate(group):
            numel = torch.Size(shape).numel()
            groups[-1][f"{number}.{place}"] = torch.arange(float(count), float(count + numel)).view(shape)
            count += numel
    return groups


@given(
    st.lists(shapes, min_size=1, max_size=2),
    st.integers(1, 4),
    st.sampled_from([1, 4]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=25)
def test_whatever_is_cut_is_whole_again(
    all_shapes: list[list[tuple[int, ...]]], num_ranks: int, align: int, gaps: bool, lean: bool, elastic: bool
) -> None:
    groups = numbered(all_shapes)
    with TemporaryDirectory() as folder:
        write_model(Path(folder), groups)
        write_ranks(Path(folder), groups, num_ranks, align=align, gaps=gaps, lean=lean, elastic=elastic)
        files = RankFiles(Path(folder))
        assert files.options == (None if elastic else [{"lr": LR}] * len(groups))
        for group in groups:
            for name, param in group.items():
                state = files.state(name)
                assert torch.equal(files.master(name), param)
                assert state.keys() == {"step", "exp_avg"} and torch.equal(state["exp_avg"], 2 * param)
                assert torch.equal(state["step"], torch.tensor(3.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, each of which has a part of the first parameter."""
    write_model(tmp_path, GROUPS)
    write_ranks(tmp_path, GROUPS, 2, align=4)
    return tmp_path


def refused(folder: Path, message: str, error: type[Exception] = StateError) -> None:
    with pytest.raises(error, match=message):
        RankFiles(folder)


def test_what_one_rank_has_is_a_view_of_its_file(folder: Path) -> None:
    write_ranks(folder, GROUPS, 2, align=8)
    files = RankFiles(folder)
    for name, is_view in (("a", True), ("b", False)):
        one, other = files.master(name), files.master(name)
        assert (one.data_ptr() == other.data_ptr()) is is_view


def test_the_model_is_read_as_it_was_saved(folder: Path) -> None:
    model = ModelFile.read(folder)
    assert (model.path, model.version) == (model_path(folder), VERSION)
    assert model.shapes == [{"a": (2, 3), "b": (5,)}, {"c": ()}]
    assert model.groups == {"a": 0, "b": 0, "c": 1}
    assert model.module["b"].dtype is torch.bfloat16


def test_ranks_are_put_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """And not in that of their names, of which "10" comes before "2"."""
    groups = [{"a": torch.arange(22.0)}]
    write_model(tmp_path, groups)
    write_ranks(tmp_path, groups, 11)
    assert torch.equal(RankFiles(tmp_path).master("a"), groups[0]["a"])


def test_a_count_may_be_one_number_and_is_all_the_same(folder: Path) -> None:
    for rank in range(2):
        change(rank_path(folder, rank), SAVED, "partition_count", value=2)
    assert torch.equal(RankFiles(folder).master("a"), GROUPS[0]["a"])


def test_values_that_are_no_partitions_have_to_be_alike(folder: Path) -> None:
    for rank in range(2):
        change(rank_path(folder, rank), SAVED, BASE, "state", 0, "scale", value=[1, 2])
    assert RankFiles(folder).state("b")["scale"] == [1, 2]
    change(rank_path(folder, 1), SAVED, BASE, "state", 0, "scale", value=[1, 3])
    with pytest.raises(
        StateError, match=r"rank_1_.* has scale \[1, 3\] in group 0, .*rank_0_.* has \[1, 2\]: .*one save"
    ):
        RankFiles(folder).state("b")


def test_state_that_only_some_have_is_of_different_saves(folder: Path) -> None:
    change(rank_path(folder, 1), SAVED, BASE, "state", 0, "more", value=1)
    with pytest.raises(StateError, match=r"rank_1_.* has state \['exp_avg', 'more', 'step'\] in group 0"):
        RankFiles(folder).state("a")


def test_state_of_another_shape_is_refused(folder: Path) -> None:
    change(rank_path(folder, 0), SAVED, BASE, "state", 0, "exp_avg", value=torch.zeros(2, 4))
    with pytest.raises(StateError, match=r"'exp_avg' of shape \[2, 4\] in group 0, whose partition has 8 elements"):
        RankFiles(folder).state("a")


def test_a_step_may_stand_among_the_options(folder: Path) -> None:
    for rank in range(2):
        change(rank_path(folder, rank), SAVED, BASE, "param_groups", 0, "step", value=5)
        change(rank_path(folder, rank), SAVED, BASE, "state", 0, value={})
    assert torch.equal(RankFiles(folder).state("a")["step"], torch.tensor(5.0))


def test_a_missing_rank_is_named(folder: Path) -> None:
    rank_path(folder, 1).unlink()
    refused(folder, r"rank_0_.* is of a run of 2 ranks, but zero_pp_rank_1_mp_rank_00_optim_states.pt is missing")
    write_ranks(folder, GROUPS, 3)
    rank_path(folder, 1).unlink()
    refused(folder, "there is no file .*rank_1_")


def test_files_of_a_larger_run_are_too_many(folder: Path) -> None:
    write_ranks(folder, GROUPS, 3)
    write_ranks(folder, GROUPS, 2)
    refused(folder, "rank_0_.* is of a run of 2 ranks, but there are files of 3: take away")


def test_files_of_two_runs_are_told_apart(folder: Path) -> None:
    rank_path(folder, 0).rename(folder / f"bf16_{rank_path(folder, 0).name}")
    refused(folder, "files of several runs, bf16_zero_pp_rank_… and zero_pp_rank_…")


def test_without_zero_there_are_no_files_of_ranks(tmp_path: Path) -> None:
    write_model(tmp_path, GROUPS)
    refused(tmp_path, "has no '…zero_pp_rank_…_optim_states.pt': the run did not use ZeRO")


def test_more_groups_than_the_model_has_are_refused(folder: Path) -> None:
    change(rank_path(folder, 1), SAVED, "group_paddings", value=[0, 0, 0])
    refused(folder, "rank_1_.* has 3 param_groups in its paddings, the file of the model has 2")


@pytest.mark.parametrize("numel", [10, 25])
def test_parameters_have_to_fill_the_partitions(folder: Path, numel: int) -> None:
    write_model(folder, [{"a": torch.zeros(numel)}, GROUPS[1]])
    if numel == 10:  # one element is left over, the others may be padding
        change(rank_path(folder, 1), SAVED, "group_paddings", value=[5, 3])
    refused(folder, rf"has 16 elements in group 0 .* has parameters of {numel}: they are not of one save")


@pytest.mark.parametrize("key", ["partition_count", "single_partition_of_fp32_groups", "group_paddings", BASE])
def test_another_layout_is_named_by_key_and_version(folder: Path, key: str) -> None:
    change(rank_path(folder, 1), SAVED, key)
    refused(folder, rf"rank_1_.*, written by DeepSpeed {VERSION}, has no '{key}': its layout is not known")


def test_what_is_no_mapping_has_no_entries() -> None:
    with pytest.raises(StateError, match="file, written by DeepSpeed 1, has no 'a'"):
        entry([1], "a", Path("file"), "1")
    assert entry({"a": 0}, "a", Path("file"), "1") == 0


@pytest.mark.parametrize("stage", [None, 1, 2, StandIn(1), StandIn(2)])
def test_stages_1_and_2_are_read(stage: Any) -> None:
    check_stage({} if stage is None else {"zero_stage": stage}, Path("file"))


@pytest.mark.parametrize("stage", [0, 3, StandIn(3)])
def test_other_stages_are_refused(stage: Any) -> None:
    with pytest.raises(NotSupportedError, match="file is of ZeRO stage 3, .*ds_to_universal"):
        check_stage({"zero_stage": stage}, Path("file"))


def test_stage_3_is_known_by_its_files(folder: Path) -> None:
    model_path(folder).rename(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    refused(folder, "stage 3", NotSupportedError)


@pytest.mark.parametrize(
    "name", ["mp_rank_01_model_states.pt", "layer_00-model_states.pt", "expert_0_mp_rank_00_model_states.pt"]
)
def test_parts_of_a_split_model_are_refused(folder: Path, name: str) -> None:
    (folder / name).touch()
    refused(folder, f"{name} belongs to a model that was split over ranks", NotSupportedError)


@pytest.mark.parametrize(("key", "value"), [("mp_world_size", 2), ("num_experts", [4])])
def test_a_model_that_says_it_was_split_is_refused(folder: Path, key: str, value: Any) -> None:
    write_model(folder, GROUPS, **{key: value})
    refused(folder, "belongs to a model that was split over ranks", NotSupportedError)


def test_a_huge_number_of_a_rank_takes_no_memory(folder: Path) -> None:
    rank_path(folder, 1).rename(rank_path(folder, 10**18))
    refused(folder, f"there is no file .*rank_1_.*, and one of rank {10**18}")


def test_what_holds_no_dict_is_refused(folder: Path) -> None:
    torch.save([1], rank_path(folder, 1))
    refused(folder, r"rank_1_.* holds a list, expected a dict")
