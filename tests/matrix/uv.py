"""Environments, made by uv: what two of them share is fetched and unpacked once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class CommandError(Exception):
    """A command has failed; its log says why."""


def run(command: list[str], log: Path, cwd: Path | None = None, **variables: str) -> int:
    """The status of a command. What it prints goes to the end of `log`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        return subprocess.run(
            command, cwd=cwd, env={**environment, **variables}, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode


def run_or_fail(what: str, command: list[str], log: Path, **variables: str) -> None:
    """As `run`.

    Raises:
        CommandError: it has failed; the message names `what`.
    """
    if run(command, log, **variables) != 0:
        raise CommandError(f"{what} failed")


class Uv:
    """uv with a cache of its own, and what it prints in `log`."""

    def __init__(self, cache: Path, log: Path) -> None:
        self._cache = cache
        self.log = log

    def make(self, environment: Path, python: Path) -> None:
        """An empty environment.

        Raises:
            CommandError: uv has failed.
        """
        self._run("venv", "--clear", "--python", str(python), str(environment))

    def install(self, environment: Path, *what: str, **variables: str) -> None:
        """Install packages.

        Raises:
            CommandError: uv has failed.
        """
        self._run("pip", "install", "--python", str(environment / "bin" / "python"), *what, **variables)

    def _run(self, *arguments: str, **variables: str) -> None:
        command = [sys.executable, "-m", "uv", "--quiet", "--cache-dir", str(self._cache), *arguments]
        run_or_fail(f"uv {arguments[0]}", command, self.log, **variables)
