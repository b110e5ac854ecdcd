"""Directories appear at once, are replaced at once, and nothing that is not ours is lost."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from written_checkpoints import version_of, write

from zeroopt import CheckpointError
from zeroopt.checkpoint.disk import directory as directories
from zeroopt.checkpoint.disk.directory import aside, is_aside, remove, remove_left_aside


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_checkpoint_is_replaced_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "last"
    for version in range(3):
        write(path, version)
        assert version_of(path) == version
        assert names(path.parent) == ["last"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    write(tmp_path / "last", 1)
    assert version_of(tmp_path / "last") == 1


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert version_of(tmp_path / "real") == 2


def put_file(path: Path) -> None:
    path.write_text("thesis")


def put_directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("thesis")


def put_checkpoint_and_more(path: Path) -> None:
    write(path, 1)
    (path / "thesis.tex").write_text("thesis")


def put_damaged_checkpoint(path: Path) -> None:
    write(path, 1)
    (path / "zeroopt.json").write_text("{}")


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (put_file, "last is a file"),
        (put_directory, "last holds 'thesis.tex', which is not part"),
        (put_checkpoint_and_more, "last holds 'thesis.tex', which is not part"),
        (put_damaged_checkpoint, "last/zeroopt.json is damaged: 'crc32'. A checkpoint of which not all is known"),
    ],
)
def test_what_is_not_ours_stays(put: Any, message: str, tmp_path: Path) -> None:
    put(tmp_path / "last")
    before = [(path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "last", 2)
    assert [(path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()] == before
    assert names(tmp_path) == ["last"]


def test_what_comes_into_the_way_while_it_is_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = directories.sync_directory

    def sync_and_intrude(path: Path) -> None:
        if is_aside(path):
            put_directory(tmp_path / "last")
        sync(path)

    monkeypatch.setattr(directories, "sync_directory", sync_and_intrude)
    with pytest.raises(CheckpointError, match="thesis"):
        write(tmp_path / "last", 2)
    assert names(tmp_path) == ["last"]
    assert names(tmp_path / "last") == ["thesis.tex"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_exchange_is_told_before_anything_is_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "last", 1)

    class Library:
        def renameat2(self, *args: Any) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Library())
    with pytest.raises(
        CheckpointError, match="preparing .* cannot exchange two directories .*path that does not exist"
    ):
        write(tmp_path / "last", 2)
    write(tmp_path / "other", 2)
    monkeypatch.undo()
    assert version_of(tmp_path / "last") == 1
    assert version_of(tmp_path / "other") == 2
    assert names(tmp_path) == ["last", "other"]


def test_what_killed_runs_have_left_is_removed_when_nobody_works_on_it(tmp_path: Path) -> None:
    left = [tmp_path / ".last.01234567.partial", tmp_path / ".other.01234567.partial"]
    alike = [tmp_path / ".last.partial", tmp_path / ".last.0123456x.partial", tmp_path / "last.01234567.partial"]
    for path in left + alike:
        path.mkdir()
        (path / "__0_0.distcp").write_text("")
    (tmp_path / ".last.00000000.partial").write_text("a file")
    with aside(tmp_path / "last") as mine:
        assert not left[0].exists()
        assert left[1].exists()
        remove_left_aside(tmp_path)
        assert not left[1].exists()
        assert mine.exists()
    assert not mine.exists()
    assert names(tmp_path) == sorted([path.name for path in alike] + [".last.00000000.partial"])


def test_without_locks_those_of_other_targets_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [tmp_path / ".last.01234567.partial", tmp_path / ".other.01234567.partial"]
    for path in left:
        path.mkdir()

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(directories.fcntl, "flock", no_locks)
    remove_left_aside(tmp_path, "last")
    remove_left_aside(tmp_path)
    assert names(tmp_path) == [left[1].name]


def test_a_checkpoint_is_removed_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "last", 1)
    monkeypatch.setattr(directories, "_remove_tree", lambda path: None)
    remove(tmp_path / "last")
    [left] = tmp_path.iterdir()
    assert is_aside(left)


@pytest.mark.slow
def test_importing_zeroopt_does_not_import_dcp() -> None:
    code = "import sys, zeroopt; assert 'torch.distributed.checkpoint' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
