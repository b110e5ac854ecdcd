"""Pythons that do not run are passed over."""

from __future__ import annotations

import os
from pathlib import Path

from tests.matrix.interpreters import interpreter


def write(path: Path, script: str) -> Path:
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_first_that_runs_is_taken(tmp_path: Path) -> None:
    refuses = write(tmp_path / "shims" / "python3.99", "exit 127")
    another = write(tmp_path / "renamed" / "python3.99", "echo 3.98")
    runs = write(tmp_path / "bin" / "python3.99", "echo 3.99")
    path = os.pathsep.join(str(folder.parent) for folder in (refuses, another, runs))
    assert interpreter("3.99", {"PATH": path}) == runs
    assert interpreter("3.98", {"PATH": path}) is None
    assert interpreter("3.99", {}) is None
