"""The Pythons of this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path


def interpreter(version: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """`python3.X` of the first folder on PATH where it runs. There may be some that do not: pyenv has one for every version that it
    knows of, and those refuse that are not switched on."""
    for folder in environment.get("PATH", "").split(os.pathsep):
        found = Path(folder, f"python{version}")
        if os.access(found, os.X_OK) and _version(found) == version:
            return found
    return None


def _version(python: Path) -> str | None:
    asked = "import sys; print(*sys.version_info[:2], sep='.')"
    try:
        done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
