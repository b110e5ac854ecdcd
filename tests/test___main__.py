"""The command line prints what was asked for, and its exit code says whether all is well."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from written_checkpoints import write

from zeroopt.__main__ import main
from zeroopt.diagnosis.env import environment
from zeroopt.elastic.place import FileName, directory_of, jobs


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["zeroopt", *map(str, arguments)])
    return main()


def test_env_prints_every_fact(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "env") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == list(environment())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: command"),
        (["checkpoint"], "required: command"),
        (["checkpoint", "inspect"], "required: path"),
        (["checkpoint", "export", "a"], "required: --to"),
        (["train"], "invalid choice: 'train'"),
        (["env", "--json"], "unrecognized arguments: --json"),
    ],
    ids=str,
)
def test_wrong_arguments_are_told_with_the_usage(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *arguments)
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: python -m zeroopt") and expected in told


def test_an_error_is_one_line_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "checkpoint", "export", tmp_path / "none", "--to", tmp_path / "file") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path / "none") in err


def test_a_checkpoint_that_is_whole_and_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 3)
    assert run(monkeypatch, "checkpoint", "inspect", tmp_path / "a") == 0
    (tmp_path / "a" / "rank0.pt").unlink()
    assert run(monkeypatch, "checkpoint", "inspect", tmp_path / "a") == 1
    assert "rank0.pt" in capsys.readouterr().out


def test_copies_in_memory_are_listed_and_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for job in ("a", "b"):
        directory_of(job, tmp_path).mkdir()
    file = directory_of("b", tmp_path) / str(FileName(1, 1, 1, 0))
    file.write_bytes(bytes(100))
    taken = 512 * file.stat().st_blocks  # which is up to the file system
    assert run(monkeypatch, "elastic", "list", "--memory", tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == ["a  0 bytes", f"b  {taken} bytes"]
    assert run(monkeypatch, "elastic", "remove", "b", "c", "--memory", tmp_path) == 1
    assert "no job of this user with the name 'c'" in capsys.readouterr().err
    assert run(monkeypatch, "elastic", "remove", "b", "--memory", tmp_path) == 0
    assert list(jobs(tmp_path)) == ["a"]


@pytest.mark.parametrize(("command", "code"), [(["env"], 0), (["checkpoint", "inspect", "nowhere"], 1)], ids=str)
def test_the_exit_code_is_that_of_the_process(
    command: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "zeroopt.__main__")  # run as `python -m zeroopt` runs it, not imported before
    monkeypatch.setattr(sys, "argv", ["zeroopt", *command])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("zeroopt", run_name="__main__")
    assert left.value.code == code
    assert ("cannot be opened: " in capsys.readouterr().out) is (code == 1)
