"""Damage of any kind is noticed and named, on all ranks, and nothing that a checkpoint holds is run."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from worker_pool import RunOnRanks
from written_checkpoints import entries, shard, version_of, whole, write

from tests.checkpoint.format.test_plain import Malicious
from tests.checkpoint.format.test_planning import write_as_ranks
from zeroopt import CheckpointError
from zeroopt.checkpoint.format.reading import open_checkpoint

FILES = [".metadata", "__0_0.distcp", "rank0.pt", "zeroopt.json"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "pristine"
    write(path, 1)
    return path


def open_and_verify(path: Path) -> None:
    open_checkpoint(path).verify(None)


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_noticed(name: str, data: st.DataObject, pristine: Path) -> None:
    content = (pristine / name).read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = content[position] ^ (1 << data.draw(st.integers(0, 7)))
    try:
        (pristine / name).write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=name):
            open_and_verify(pristine)
    finally:
        (pristine / name).write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_a_file_cut_off_or_too_long_is_noticed(name: str, data: st.DataObject, pristine: Path) -> None:
    content = (pristine / name).read_bytes()
    kept = data.draw(st.integers(0, len(content) - 1))
    added = data.draw(st.binary(min_size=1).filter(lambda added: added.strip()))
    try:
        for damaged in (content[:kept], content + added):
            (pristine / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=name):
                open_and_verify(pristine)
    finally:
        (pristine / name).write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def take_from_another(path: Path) -> None:
    """Of the same size."""
    write(path.parent.with_name("another"), 2)
    shutil.copy(path.parent.with_name("another") / path.name, path)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", [name for name in FILES if name != "zeroopt.json"])
@pytest.mark.parametrize("damage", [remove, take_from_another, make_directory])
def test_a_missing_or_foreign_file_is_named(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    damage(tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match=name):
        open_and_verify(tmp_path / "a")


def test_a_file_more_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    (tmp_path / "a" / "__7_0.distcp").write_text("")
    with pytest.raises(CheckpointError, match="__7_0.distcp is not a file of this checkpoint: move it away"):
        open_and_verify(tmp_path / "a")


def errors_of_damage(path: Path) -> dict[str, str]:
    """Save and verify; then damage one file after the other."""
    group = dist.group.WORLD
    write(path, 1, group)
    open_checkpoint(path).verify(group)
    errors = {}
    for name in sorted(set(os.listdir(path)) - {"zeroopt.json", ".metadata"}):
        content = (path / name).read_bytes()
        dist.barrier()
        if group.rank() == 0:
            (path / name).write_bytes(content[:-1] + b"x")
        dist.barrier()
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path).verify(group)
        errors[name] = str(caught.value)
        dist.barrier()
        if group.rank() == 0:
            (path / name).write_bytes(content)
    return errors


def test_all_ranks_hear_of_any_damage(tmp_path: Path, run_on_ranks: RunOnRanks) -> None:
    errors, *others = run_on_ranks(3, errors_of_damage, tmp_path / "a")
    assert others == [errors] * 2
    assert len(errors) == 6
    for name, error in errors.items():
        assert f"{name} is damaged: its checksum is not" in error


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    write(tmp_path / "root" / "step-1", 1)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("file", "file is a file: no checkpoint"),
        ("nowhere", "nowhere is not there: no checkpoint"),
        ("empty", "has neither zeroopt.json nor .metadata$"),
        ("root", "has neither zeroopt.json nor .metadata; there are some in it: step-1"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


def test_side_files_and_facts(pristine: Path) -> None:
    assert version_of(pristine) == 1
    checkpoint = open_checkpoint(pristine)
    assert checkpoint.side_file("rank1.pt") is None
    assert checkpoint.facts == {"version": 1}
    assert checkpoint.manifest is not None


def test_reading_a_damaged_file_names_it(tmp_path: Path) -> None:
    """When nobody has called verify."""
    write(tmp_path / "a", 1)
    os.truncate(tmp_path / "a" / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match="cannot read .*a/__0_0.distcp"):
        open_checkpoint(tmp_path / "a").read({"model.weight": torch.empty(5, 7)})
    (tmp_path / "a" / "rank0.pt").write_text("")
    with pytest.raises(CheckpointError, match="cannot load .*rank0.pt"):
        open_checkpoint(tmp_path / "a").side_file("rank0.pt")


# Checkpoints that DCP alone wrote.


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_plain(path: Path, **more: Any) -> None:
    model = {"weight": whole(1), "step": 3, **more}
    dcp.save({"model": model}, checkpoint_id=path)


def test_one_of_dcp_alone_opens(tmp_path: Path) -> None:
    write_plain(tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    checkpoint.verify(None)
    target = torch.empty(5, 7)
    assert checkpoint.read({"model.weight": target, "model.step": None}) == {"model.step": 3}
    assert torch.equal(target, whole(1))
    assert checkpoint.facts is None
    assert checkpoint.side_file("rank0.pt") is None
    os.truncate(tmp_path / "a" / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match="__0_0.distcp is cut off: it has 100 of"):
        checkpoint.verify(None)
    (tmp_path / "a" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp is missing"):
        checkpoint.verify(None)


def test_code_in_an_entry_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_plain(tmp_path / "a", extra=Malicious(made))
    checkpoint = open_checkpoint(tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot read .*__0_0.distcp: cannot load model.extra"):
        checkpoint.read({"model.extra": None})
    assert not made.exists()


def test_code_in_the_metadata_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_plain(tmp_path / "a")
    file = tmp_path / "a" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = Malicious(made)
    for content in (metadata, Malicious(made)):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged or no checkpoint's: it asks for posix.mkdir"):
            open_checkpoint(tmp_path / "a")
    assert not made.exists()


def test_code_in_a_tensor_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_plain(tmp_path / "a")
    metadata_file = tmp_path / "a" / ".metadata"
    metadata = pickle.loads(metadata_file.read_bytes())
    torch.save(Malicious(made), tmp_path / "a" / "bad.distcp")
    index = next(index for index in metadata.storage_data if index.fqn == "model.weight")
    metadata.storage_data[index] = _StorageInfo("bad.distcp", 0, (tmp_path / "a" / "bad.distcp").stat().st_size)
    metadata_file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"cannot read .*bad\.distcp"):
        open_checkpoint(tmp_path / "a").read({"model.weight": torch.empty(5, 7)})
    assert not made.exists()


@pytest.mark.parametrize(
    "place",
    [
        _StorageInfo("../secret", 0, 1),
        _StorageInfo("/etc/passwd", 0, 1),
        _StorageInfo("..", 0, 1),
        _StorageInfo("a", "0", 1),  # type: ignore[arg-type]
        7,
    ],
)
def test_metadata_that_leads_elsewhere_is_refused(place: Any, tmp_path: Path) -> None:
    write_plain(tmp_path / "a")
    file = tmp_path / "a" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.storage_data[MetadataIndex("model.step")] = place
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged or no checkpoint's: .*model.step"):
        open_checkpoint(tmp_path / "a")


def test_other_pickles_are_no_metadata(tmp_path: Path) -> None:
    for content in (pickle.dumps({}), b"", b"\x80\x04.", pickle.dumps(entries(1)["optimizer"]["param_groups"])):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged or no checkpoint's"):
            open_checkpoint(tmp_path)


def change_metadata(path: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    size = (tmp_path / "a" / name).stat().st_size
    (tmp_path / "a" / name).unlink()
    os.mkfifo(tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match=f"{name}.*(not an ordinary file|has 0 bytes, and had {size})"):
        open_and_verify(tmp_path / "a")


def test_one_of_dcp_does_not_wait_for_a_pipe_either(tmp_path: Path) -> None:
    write_plain(tmp_path / "a")
    checkpoint = open_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "__0_0.distcp").unlink()
    os.mkfifo(tmp_path / "a" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="not an ordinary file"):
        checkpoint.read({"model.step": None})


def test_parts_upon_each_other_are_refused(tmp_path: Path) -> None:
    """They have as many elements as the tensor, and leave some of it as they were."""
    parts = {"weight": shard(whole(1), 0, 14)}, {"weight": shard(whole(1), 14, 35)}
    (tmp_path / "a").mkdir()
    write_as_ranks(tmp_path / "a", list(parts))

    def shift(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["weight"].chunks
        chunks[1].offsets = torch.Size([1, 0])
        chunks[1].sizes = torch.Size([3, 7])
        second = next(index for index in metadata.storage_data if index.offset == torch.Size([2, 0]))
        place = metadata.storage_data.pop(second)
        metadata.storage_data[MetadataIndex("weight", torch.Size([1, 0]), second.index)] = place

    change_metadata(tmp_path / "a", shift)
    with pytest.raises(CheckpointError, match="parts of 'weight' lie upon each other"):
        open_checkpoint(tmp_path / "a").read({"weight": torch.empty(5, 7)})


def test_a_part_that_is_nowhere_is_named(tmp_path: Path) -> None:
    write_plain(tmp_path / "a")
    change_metadata(tmp_path / "a", lambda metadata: metadata.storage_data.pop(MetadataIndex("model.step")))
    with pytest.raises(CheckpointError, match="does not say where .*model.step"):
        open_checkpoint(tmp_path / "a").read({"model.step": None})


def test_a_value_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    write_plain(tmp_path / "a")
    torch.save(bytearray(1 << 20), tmp_path / "a" / "made", pickle_protocol=2)
    file = zipfile.ZipFile(tmp_path / "a" / "bomb.distcp", "w", zipfile.ZIP_DEFLATED)
    with file, zipfile.ZipFile(tmp_path / "a" / "made") as made:
        for name in made.namelist():
            file.writestr(name, made.read(name))
    length = (tmp_path / "a" / "bomb.distcp").stat().st_size
    place = _StorageInfo("bomb.distcp", 0, length)
    change_metadata(tmp_path / "a", lambda metadata: metadata.storage_data.update({MetadataIndex("model.step"): place}))
    with pytest.raises(CheckpointError, match="is compressed, which torch.save does not do"):
        open_checkpoint(tmp_path / "a").read({"model.step": None})
