"""Two directories change places at once, or nothing is touched and somebody is told why."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path
from typing import Any

import pytest

from zeroopt import CheckpointError
from zeroopt.checkpoint.disk.exchange import exchange, try_exchange

UNABLE = "cannot exchange two directories at once .*path that does not exist yet"


def put(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def contents(*paths: Path) -> list[str]:
    return [(path / "file").read_text() for path in paths]


def fail_with(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system's call return this error."""

    class Library:
        def renameat2(self, *args: Any) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Library())


def test_directories_change_places(tmp_path: Path) -> None:
    one, other = put(tmp_path / "one", "1"), put(tmp_path / "ünïcödé", "2")
    inodes = [path.stat().st_ino for path in (one, other)]
    exchange(one, other)
    assert contents(one, other) == ["2", "1"]
    assert [path.stat().st_ino for path in (other, one)] == inodes, "moved, not copied"
    exchange(one, other)
    assert contents(one, other) == ["1", "2"]


def test_what_is_not_empty_is_no_obstacle_for_what_is(tmp_path: Path) -> None:
    one, empty = put(tmp_path / "one", "1"), tmp_path / "empty"
    empty.mkdir()
    exchange(empty, one)
    assert list(one.iterdir()) == [] and contents(empty) == ["1"]


def test_exchanging_what_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    one = put(tmp_path / "one", "1")
    with pytest.raises(FileNotFoundError, match="other"):
        exchange(one, tmp_path / "other")
    assert contents(one) == ["1"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "b")


def test_a_library_without_the_call_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: object())
    with pytest.raises(CheckpointError, match=f"{tmp_path} {UNABLE}") as raised:
        exchange(tmp_path / "a", tmp_path / "b")
    assert "no renameat2" in str(raised.value)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = put(tmp_path / "one", "1"), put(tmp_path / "other", "2")
    fail_with(code, monkeypatch)
    with pytest.raises(CheckpointError, match=f"the file system of {tmp_path} {UNABLE}"):
        exchange(one, other)
    assert contents(one, other) == ["1", "2"]


def test_another_error_is_the_systems_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(errno.EACCES, monkeypatch)
    with pytest.raises(PermissionError) as raised:
        exchange(tmp_path / "one", tmp_path / "other")
    assert raised.value.filename == str(tmp_path / "other")


def test_trying_leaves_nothing_behind(tmp_path: Path) -> None:
    try_exchange(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trying_tells_what_an_exchange_would_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(errno.EINVAL, monkeypatch)
    with pytest.raises(CheckpointError, match=f"the file system of {tmp_path} {UNABLE}"):
        try_exchange(tmp_path)
