"""Set-up: both halves of it have to be through, and an interrupt ends both."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

# Stands for the environment's Python, of which set-up asks for nothing but pip.
PYTHON = """#!/bin/sh
case "$*" in *--editable*) half=compiles outcome=$COMPILING ;; *) half=installs outcome=$INSTALLING ;; esac
echo $half
case $outcome in waits) exec sleep 900 ;; *) exit $outcome ;; esac
"""
# Where this process runs behind `&`, interrupts do nothing, and so for all that it starts.
HEARING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('make', sys.argv[1:])"


def start_set_up(folder: Path, compiling: str, installing: str) -> subprocess.Popen[str]:
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.Popen(
        [sys.executable, "-c", HEARING, "make", "--silent", f"VENV={folder}", str(folder / ".ready")],
        cwd=ROOT,
        env={**environment, "COMPILING": compiling, "INSTALLING": installing},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(("compiling", "installing"), [("0", "0"), ("3", "0"), ("0", "3")])
def test_both_halves_have_to_succeed(tmp_path: Path, compiling: str, installing: str) -> None:
    with start_set_up(tmp_path, compiling, installing) as make:
        assert make.stdout is not None
        assert sorted(make.stdout) == ["compiles\n", "installs\n"]
    is_through = compiling == installing == "0"
    assert (make.returncode == 0) == (tmp_path / ".ready").exists() == is_through


def test_an_interrupt_ends_both(tmp_path: Path) -> None:
    with start_set_up(tmp_path, "waits", "waits") as make:
        assert make.stdout is not None
        assert {make.stdout.readline(), make.stdout.readline()} == {"compiles\n", "installs\n"}
        try:
            os.killpg(make.pid, signal.SIGINT)
            make.communicate(timeout=120)  # ends when none is left that could write
        finally:
            with suppress(ProcessLookupError):
                os.killpg(make.pid, signal.SIGKILL)
    assert make.returncode != 0 and not (tmp_path / ".ready").exists()
