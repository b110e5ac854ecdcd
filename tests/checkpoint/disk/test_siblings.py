"""The latest checkpoint of a directory, and how many are kept."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_checkpoints import version_of, write

from zeroopt import CheckpointError
from zeroopt.checkpoint.disk import manifest
from zeroopt.checkpoint.disk.siblings import latest


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_the_latest_is_the_one_that_was_saved_last(tmp_path: Path) -> None:
    for version, name in enumerate(["b", "c", "a"]):
        write(tmp_path / name, version)
    os.utime(tmp_path / "b")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").rename(tmp_path / "renamed")
    (tmp_path / "b").rename(tmp_path / ".b.01234567.partial")
    assert latest(tmp_path) == tmp_path / "renamed"


def test_there_may_be_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "not there") is None
    write(tmp_path / "a", 1)
    assert latest(tmp_path / "a") is None
    with pytest.raises(CheckpointError, match="cannot look for checkpoints in .*a/zeroopt.json: Not a directory"):
        latest(tmp_path / "a" / "zeroopt.json")


@pytest.mark.parametrize("damage", ["missing", "cut off", "manifest"])
def test_a_checkpoint_that_is_not_whole_does_not_count(damage: str, tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2)
    victim = tmp_path / "b" / ("zeroopt.json" if damage == "manifest" else "__0_0.distcp")
    if damage == "missing":
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size - 1)
    assert latest(tmp_path) == tmp_path / "a"


def test_one_of_a_newer_zeroopt_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", 1)
    with monkeypatch.context() as newer:
        newer.setattr(manifest, "FORMAT", 2)
        write(tmp_path / "b", 2)
    with pytest.raises(CheckpointError, match="b/zeroopt.json has format 2, of zeroopt .* Install a newer one"):
        latest(tmp_path)
    write(tmp_path / "c", 3, keep=1)
    assert names(tmp_path) == ["b", "c"]


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    for version in range(5):
        write(tmp_path / f"step-{version}", version)
    foreign = tmp_path / "step-0" / "notes.txt"
    foreign.write_text("mine")
    damaged = tmp_path / "step-1" / "zeroopt.json"
    damaged.write_text(json.dumps({"format": 1}))
    write(tmp_path / "step-3", 7, keep=3)
    assert names(tmp_path) == ["step-0", "step-1", "step-2", "step-3", "step-4"]
    write(tmp_path / "step-9", 9, keep=2)
    assert names(tmp_path) == ["step-0", "step-1", "step-3", "step-9"]
    assert version_of(tmp_path / "step-3") == 7
    assert foreign.exists()
    write(tmp_path / "step-10", 10, keep=1)
    assert names(tmp_path) == ["step-0", "step-1", "step-10"]


def test_those_of_other_runs_stay_and_do_not_count(tmp_path: Path) -> None:
    write(tmp_path / "a-1", 1, runs=["a"])
    write(tmp_path / "b-1", 2, runs=["b"])
    write(tmp_path / "nobodys", 3)
    write(tmp_path / "a-2", 4, keep=1, runs=["a"])
    assert names(tmp_path) == ["a-2", "b-1", "nobodys"]
    write(tmp_path / "fork-1", 5, keep=1, runs=["b", "fork"])
    assert names(tmp_path) == ["a-2", "fork-1", "nobodys"], "it has gone on from b"
    write(tmp_path / "b-2", 6, keep=1, runs=["b", "again"])
    assert names(tmp_path) == ["a-2", "b-2", "fork-1", "nobodys"]
    write(tmp_path / "old-2", 7, keep=1, runs=["", "old"])
    assert names(tmp_path) == ["a-2", "b-2", "fork-1", "old-2"], "from before runs had names"


def test_the_latest_of_some_names(tmp_path: Path) -> None:
    for version, name in enumerate(["lr1-step-10", "lr2-step-10", "lr1-step-20", "lr2-step-5"]):
        write(tmp_path / name, version)
    assert latest(tmp_path, "lr1-step-*") == tmp_path / "lr1-step-20"
    assert latest(tmp_path, "lr2-*") == tmp_path / "lr2-step-5"
    assert latest(tmp_path, "lr3-*") is None


def test_the_new_one_stays_even_when_clocks_say_that_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", 1)
    monkeypatch.setattr("time.time_ns", lambda: 0)
    write(tmp_path / "b", 2, keep=1)
    assert names(tmp_path) == ["b"]


def test_clocks_that_are_set_back_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, clock in enumerate([10**18, 10**17, 2 * 10**18, 0]):
        monkeypatch.setattr("time.time_ns", lambda now=clock: now)
        write(tmp_path / f"step-{version}", version)
        assert latest(tmp_path) == tmp_path / f"step-{version}"
    write(tmp_path / "step-0", 9)
    assert latest(tmp_path) == tmp_path / "step-0"
    write(tmp_path / "step-4", 4, keep=3)
    assert names(tmp_path) == ["step-0", "step-3", "step-4"]


def without_number(path: Path, saved_at: int) -> None:
    """Make a manifest that of a time before there were numbers."""
    content = json.loads((path / manifest.NAME).read_text())
    del content["crc32"], content["number"]
    content["saved_at"] = saved_at
    text = json.dumps(content | {"crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode())})
    (path / manifest.NAME).write_text(text)


def test_checkpoints_without_numbers_are_older_and_ordered_by_the_clock(tmp_path: Path) -> None:
    for version, name in enumerate("abc"):
        write(tmp_path / name, version)
    for name, saved_at in (("a", 5), ("b", 2**62), ("c", 7)):
        without_number(tmp_path / name, saved_at)
    assert latest(tmp_path) == tmp_path / "b"
    assert version_of(tmp_path / "b") == 1
    write(tmp_path / "d", 3)
    assert latest(tmp_path) == tmp_path / "d"
    write(tmp_path / "e", 4, keep=3)
    assert names(tmp_path) == ["b", "d", "e"]


def test_what_cannot_be_removed_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a", 1)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("zeroopt.checkpoint.disk.siblings.remove", refuse)
    write(tmp_path / "b", 2, keep=1)
    assert version_of(tmp_path / "b") == 2
    assert "cannot remove old checkpoints" in caplog.text


@given(st.integers(max_value=0))
def test_keeping_none_is_refused(keep: int) -> None:
    with pytest.raises(CheckpointError, match=f"keep has to be at least 1, or None to keep all; got {keep}"):
        write(Path("/nowhere/at/all"), 1, keep=keep)
