"""Where copies are, and whose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroopt.elastic.place import (
    FileName,
    bytes_in,
    bytes_of,
    check_private,
    directory_of,
    files_in,
    job_of_agent,
    jobs,
    make_directory,
    remove_all_but,
    remove_ended,
)
from zeroopt.errors import ConfigError

NUMBERS = st.integers(0, 10**7)


@given(st.integers(0, 2**63), NUMBERS, NUMBERS, NUMBERS)
def test_a_file_says_whose_it_is(run: int, layout: int, ranks: int, rank: int) -> None:
    name = FileName(run, layout, ranks, rank)
    assert FileName.parse(str(name)) == name
    assert FileName.parse(f".{name}") is None, "one that is being made"


def test_jobs_are_told_apart(tmp_path: Path) -> None:
    for job in ("a", "b.1"):
        directory_of(job, tmp_path).mkdir()
    (tmp_path / "something").mkdir()
    (directory_of("a", tmp_path) / str(FileName(7, 1, 2, 0))).touch()
    (directory_of("a", tmp_path) / "else").touch()
    assert list(jobs(tmp_path)) == ["a", "b.1"]
    assert files_in(directory_of("a", tmp_path)) == [FileName(7, 1, 2, 0)]
    assert files_in(directory_of("c", tmp_path)) == []
    with pytest.raises(ConfigError, match="a job's name may have letters"):
        directory_of("a/b", tmp_path)


@pytest.mark.slow
def test_what_ended_processes_have_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    mine = job_of_agent()
    start = mine.rpartition("-")[2]
    of_ended = mine.replace(f"-{os.getppid()}-", f"-{ended.stdout.strip()}-")
    of_former = mine.removesuffix(start) + "1"  # a process of the same number
    elsewhere = of_ended.replace("of-process-", "of-process-1")  # in another container
    for job in (mine, of_ended, of_former, elsewhere, "named"):
        directory_of(job, tmp_path).mkdir()
    remove_ended(tmp_path)
    assert set(jobs(tmp_path)) == {mine, elsewhere, "named"}


def test_without_torchrun_a_job_needs_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match="pass job="):
        job_of_agent()


def test_all_goes_but_what_is_named(tmp_path: Path) -> None:
    directory, kept = directory_of("a", tmp_path), FileName(7, 2, 1, 0)
    remove_all_but(directory, [kept])
    directory.mkdir()
    for name in (str(FileName(7, 1, 1, 0)), str(kept), f".{FileName(7, 3, 1, 0)}"):
        (directory / name).write_bytes(bytes(100))
    assert bytes_of("a", tmp_path) == bytes_in(directory)
    remove_all_but(directory, [kept])
    assert [path.name for path in directory.iterdir()] == [str(kept)]


def test_what_is_made_is_of_its_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "memory" / "job"
    check_private(directory)  # it is not there: nobody has part in it
    for _ in range(2):
        make_directory(directory)
        assert directory.stat().st_mode & 0o777 == 0o700


def test_what_others_have_part_in_is_refused(tmp_path: Path) -> None:
    own, open_to_others, link = (tmp_path / name for name in ("own", "open", "link"))
    own.mkdir(mode=0o700)
    link.symlink_to(own)
    open_to_others.mkdir()
    open_to_others.chmod(0o750)
    for directory in (link, open_to_others):
        with pytest.raises(
            PermissionError, match=f"{directory.name} is to be a directory of user {os.geteuid()} alone"
        ):
            make_directory(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_what_another_user_has_made_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    os.chown(tmp_path, 65534, -1)
    with pytest.raises(PermissionError, match="got one of user 65534 with the mode drwx------"):
        check_private(tmp_path)
