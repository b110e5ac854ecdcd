"""The Pythons at hand, and virtual environments of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def supported_versions() -> list[str]:
    """Those that pyproject.toml names, such as "3.11"."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


@dataclass(frozen=True)
class Interpreter:
    """A Python that runs; its version is such as "3.11"."""

    version: str
    path: Path


def find_interpreter(asked: str) -> Interpreter | None:
    """A Python: on PATH, or one of pyenv's; None where there is none that runs.

    Args:
        asked: a version, or the path of an interpreter, which is taken as it is.
    """
    is_path = os.sep in asked
    for candidate in [Path(asked)] if is_path else _candidates(asked):
        version = _version_of(candidate)
        if version is not None and (is_path or version == asked):
            return Interpreter(version, candidate)
    return None


def _candidates(version: str) -> Iterator[Path]:
    # Of pyenv's folder of scripts, one that refuses where its version is not switched on.
    yield from (Path(folder, f"python{version}") for folder in os.environ.get("PATH", "").split(os.pathsep) if folder)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python"))


def _version_of(python: Path) -> str | None:
    """None when it does not run."""
    command: list[str | Path] = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def make_environment(interpreter: Interpreter, folder: Path) -> Path:
    """An empty virtual environment in a folder, anew; returns its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter.path, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"
