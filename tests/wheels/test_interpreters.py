"""Pythons are found on PATH and among pyenv's; one that does not run is none."""

from __future__ import annotations

import os
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from wheels.interpreters import ROOT, find_interpreter, supported_versions


def write_python(path: Path, version: str, status: int = 0) -> Path:
    """A program that says that it is of this version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def pyenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its folder, and a PATH with nothing but `bin` in the temporary folder."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path / "pyenv" / "versions"


def test_the_supported_ones_are_those_of_the_metadata() -> None:
    versions = supported_versions()
    assert versions[0] == "3.10" and f"{sys.version_info[0]}.{sys.version_info[1]}" in versions


def test_cibuildwheel_builds_for_the_supported_ones() -> None:
    (asked,) = re.findall(r'^build = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    built = [minor for minor in range(8, 30) if fnmatch(f"cp3{minor}-manylinux_x86_64", asked)]
    assert [f"3.{minor}" for minor in built] == supported_versions()


def test_what_path_has_comes_first(pyenv: Path, tmp_path: Path) -> None:
    path = write_python(tmp_path / "bin" / "python3.12", "3.12")
    write_python(pyenv / "3.12.1" / "bin" / "python", "3.12")
    found = find_interpreter("3.12")
    assert found is not None and (found.version, found.path) == ("3.12", path)


def test_one_on_path_that_does_not_run_is_passed_over(pyenv: Path, tmp_path: Path) -> None:
    write_python(tmp_path / "bin" / "python3.12", "3.12", status=127)
    path = write_python(pyenv / "3.12.1" / "bin" / "python", "3.12")
    found = find_interpreter("3.12")
    assert found is not None and found.path == path


def test_behind_one_that_does_not_run_the_next_on_path_is_taken(
    pyenv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = write_python(tmp_path / "shims" / "python3.12", "", status=127)
    another = write_python(tmp_path / "renamed" / "python3.12", "3.11")
    runs = write_python(tmp_path / "bin" / "python3.12", "3.12")
    monkeypatch.setenv("PATH", os.pathsep.join(str(path.parent) for path in (refuses, another, runs)))
    found = find_interpreter("3.12")
    assert found is not None and found.path == runs


def test_a_path_is_taken_as_it_is(pyenv: Path, tmp_path: Path) -> None:
    found = find_interpreter(str(write_python(tmp_path / "somewhere" / "python", "3.13")))
    assert found is not None and found.version == "3.13"


@pytest.mark.parametrize("asked", ["3.12", "/nowhere/python3.12"])
def test_none(pyenv: Path, asked: str) -> None:
    assert find_interpreter(asked) is None
