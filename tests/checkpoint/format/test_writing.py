"""All ranks write their parts, or nothing is written; plain torch reads it."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from measure import peak_rss_bytes, reset_peak_rss, rss_bytes, run_fresh
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from worker_pool import RunOnRanks
from written_checkpoints import entries, version_of, whole, write

from zeroopt import CheckpointError
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.format.writing import write_checkpoint
from zeroopt.plan.regions import FlatLayout
from zeroopt.state.shard_tensor import ShardTensor


def save(path: Path, version: int, **options: Any) -> None:
    write(path, version, dist.group.WORLD, **options)


def read_by_dcp(path: Path) -> bool:
    target = {"model": {"weight": torch.empty(5, 7)}, "optimizer": {"param_groups": [{"lr": 0.0}]}}
    dcp.load(target, checkpoint_id=path)
    assert target["optimizer"] == {"param_groups": [{"lr": 0.1}]}
    return torch.equal(target["model"]["weight"], whole(4))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_writes_its_part_and_dcp_reads_them(
    world_size: int, tmp_path: Path, run_on_ranks: RunOnRanks
) -> None:
    path = tmp_path / "a"
    for version in (3, 4):
        run_on_ranks(world_size, save, path, version)
        assert version_of(path) == version
    assert {f"__{rank}_0.distcp" for rank in range(world_size)} < set(os.listdir(path))
    assert all(run_on_ranks(world_size, read_by_dcp, path))
    dcp_to_torch_save(path, tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert plain["optimizer"]["param_groups"] == entries(4)["optimizer"]["param_groups"]
    assert list(plain["optimizer"]["state"]) == ["weight"]
    assert torch.equal(plain["model"]["weight"], whole(4))
    assert torch.equal(plain["optimizer"]["state"]["weight"]["exp_avg"], -whole(4))


def save_in_sub_group(path: Path) -> None:
    group = dist.new_group([1, 2])
    if dist.get_rank() > 0:
        write(path, 1, group)


def test_a_group_without_rank_0_writes(tmp_path: Path, run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(3, save_in_sub_group, tmp_path / "a")
    assert version_of(tmp_path / "a") == 1


# What goes wrong.


@contextmanager
def small_files() -> Iterator[None]:
    """The system refuses to let files grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def new_files(open_new: Callable[[Path], Any]) -> Iterator[None]:
    """Have files that do not exist yet opened so."""
    plain_open = Path.open

    def open_file(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return open_new(path) if mode == "xb" else plain_open(path, mode, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "open", open_file)
        yield


def full_disk() -> AbstractContextManager[None]:
    return new_files(lambda _: open("/dev/full", "wb"))


def no_permission() -> AbstractContextManager[None]:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    return new_files(refuse)


@contextmanager
def failing_sync() -> Iterator[None]:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        yield


TROUBLES = {"small files": small_files, "full disk": full_disk, "no permission": no_permission, "sync": failing_sync}


def error_of_save(path: Path, trouble: str, troubled: int) -> str:
    try:
        with TROUBLES[trouble]() if dist.get_rank() == troubled else nullcontext():
            save(path, 2)
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("troubled", [0, 1])
@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("small files", "File too large"),
        ("full disk", "No space left on device"),
        ("no permission", "Permission denied"),
        ("sync", "Input/output error"),
    ],
)
@pytest.mark.parametrize("existing", [True, False])
def test_trouble_on_one_rank_is_told_on_all_and_changes_nothing(
    trouble: str, reason: str, troubled: int, existing: bool, tmp_path: Path, run_on_ranks: RunOnRanks
) -> None:
    path = tmp_path / "a"
    if existing:
        run_on_ranks(2, save, path, 1)
    error, same = run_on_ranks(2, error_of_save, path, trouble, troubled)
    assert error == same
    assert f"failed on rank {troubled}: cannot write {tmp_path}/.a." in error
    assert error.endswith(f"__{troubled}_0.distcp: {reason}")
    assert os.listdir(tmp_path) == ["a"] * existing
    if existing:
        assert version_of(path) == 1
    run_on_ranks(2, save, path, 3)
    assert version_of(path) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_becomes_full(small_disk: Path, run_on_ranks: RunOnRanks) -> None:
    """The old checkpoint fits, and the new one does not fit beside it."""
    run_on_ranks(2, save, small_disk / "a", 1)
    used = sum(os.stat(small_disk / "a" / name).st_blocks * 512 for name in os.listdir(small_disk / "a"))
    (small_disk / "ballast").write_bytes(b"x" * (65536 - used - 8192))
    errors = run_on_ranks.outcomes(2, save, small_disk / "a", 2)
    assert errors[0] == errors[1]
    assert "No space left on device" in str(errors[0])
    assert sorted(os.listdir(small_disk)) == ["a", "ballast"]
    assert version_of(small_disk / "a") == 1


def save_bad_entry(path: Path, where: str) -> None:
    given: dict[str, Any] = {"entries": entries(2), "facts": {}, "side_files": {}}
    if dist.get_rank() == 1:
        given[where] = {
            "entries": {"model": {"f": print}},
            "facts": {"f": print},
            "side_files": {"rank1.pt": {"f": print}},
        }[where]
    write_checkpoint(path, **given, group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("entries", "model.f is a builtins.builtin_function_or_method, which could only"),
        ("facts", "the facts of a checkpoint have to be plain JSON"),
        ("side_files", r"rank1.pt\['f'\] is a builtins.builtin_function"),
    ],
)
def test_what_cannot_be_saved_is_told_on_all_ranks_before_anything_is_written(
    where: str, message: str, tmp_path: Path, run_on_ranks: RunOnRanks
) -> None:
    errors = run_on_ranks.outcomes(2, save_bad_entry, tmp_path / "a", where)
    assert errors[0] == errors[1]
    assert message.replace("\\", "") in str(errors[0])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a/b", "..", ".metadata", "", "__0_0.distcp", "zeroopt.json"])
def test_side_files_have_names_of_their_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be the name of a file|File exists"):
        write_checkpoint(tmp_path / "a", entries(1), {}, {name: 1}, None)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="preparing the checkpoint .*/file/a failed on rank 0: .*File exists"):
        write(tmp_path / "file" / "a", 1)


# Memory.

# Of 72 MiB each of two ranks has half: malloc gives so much back at once.
ROWS, COLUMNS, TENSORS = 2304, 8192, 4


def peak_of_save(path: Path) -> float:
    """Highest memory above that before, in copies of a tensor's part."""
    layout = FlatLayout.of((ROWS, COLUMNS), (COLUMNS, 1))
    part = ROWS * COLUMNS // 2

    def computed(begin: int, end: int) -> Tensor:
        return torch.ones(end - begin)

    def shard_of(local: Tensor, **options: Any) -> ShardTensor:
        return ShardTensor(layout, dist.get_rank() * part, local, **options)

    bucket = torch.ones(part + 1)
    given = {f"{number}": shard_of(torch.empty(part), read=computed) for number in range(TENSORS - 1)}
    with peak_in_copies(part) as saving:
        write_checkpoint(path, {"model": {**given, "view": shard_of(bucket[1:])}}, {}, {}, dist.group.WORLD)
    target = shard_of(torch.full((part,), 0.5))
    with peak_in_copies(part) as reading:
        open_checkpoint(path).read({"model.1": target})
    return max(*saving, *reading)


@contextmanager
def peak_in_copies(part: int) -> Iterator[list[float]]:
    peak: list[float] = []
    before = rss_bytes()
    reset_peak_rss()
    yield peak
    peak.append((peak_rss_bytes() - before) / (part * 4))


@pytest.mark.slow
def test_one_tensor_is_copied_at_a_time(tmp_path: Path) -> None:
    assert max(run_fresh(2, peak_of_save, tmp_path / "a")) < 1.3
