"""A copy of the sources for each Python, and its module of kernels.

They do not link torch: what is built once for a Python serves all releases of torch. Nor does what takes most of the time to compile
know the Python, so it is built once for all. The sources at hand keep their own kernels, which may be others, with CUDA.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from tests.matrix.uv import Uv, run_or_fail
from tests.support.paths import ROOT

_LEFT_OUT = (".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "runs", "site")
# CMake and Ninja of the environment that this runs in, before the system's.
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


class Trees:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kernels: Path | None = None
        self._built: dict[str, Path] = {}

    def of(self, python: str, environment: Path, uv: Uv) -> Path:
        """The tree of a Python, built for the first environment that asks for it.

        Raises:
            CommandError: the kernels could not be built.
        """
        if python not in self._built:
            if self._kernels is None:
                self._kernels = _build_kernels(self._folder / "kernels", uv.log)
            tree = self._folder / f"python-{python}"
            shutil.rmtree(tree, ignore_errors=True)
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_LEFT_OUT))
            with_kernels = f"{os.environ.get('CMAKE_ARGS', '')} {shlex.quote(f'-DZEROOPT_KERNELS={self._kernels}')}"
            uv.install(environment, "--no-deps", "--editable", str(tree), CMAKE_ARGS=with_kernels.strip())
            self._built[python] = tree
        return self._built[python]


def _build_kernels(folder: Path, log: Path) -> Path:
    """Compile what needs no Python; in a folder that is there, what has changed. Returns the folder."""
    jobs = os.environ.get("MAX_JOBS")
    plan = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DZEROOPT_MODULE=OFF", "-DZEROOPT_CUDA=off"]
    build = ["cmake", "--build", str(folder), *(["--parallel", jobs] if jobs else [])]
    for command in (plan, build):
        run_or_fail(" ".join(command[:2]), command, log, PATH=_PATH)
    return folder
