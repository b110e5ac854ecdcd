"""A copy of the sources for each Python, with its kernels.

They do not link torch: what is built once for a Python serves all releases of torch. The sources at hand keep their own kernels, which
may be others, with CUDA.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.matrix.uv import Uv
from tests.support.paths import ROOT

_LEFT_OUT = (".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "runs", "site")


class Trees:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._built: dict[str, Path] = {}

    def of(self, python: str, environment: Path, uv: Uv) -> Path:
        """The tree of a Python, built for the first environment that asks for it.

        Raises:
            CommandError: the kernels could not be built.
        """
        if python not in self._built:
            tree = self._folder / f"python-{python}"
            shutil.rmtree(tree, ignore_errors=True)
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_LEFT_OUT))
            arguments = os.environ.get("CMAKE_ARGS", "")
            without_cuda = {"CMAKE_ARGS": f"{arguments} -DZEROOPT_CUDA=off".strip()}
            uv.install(environment, "--no-deps", "--editable", str(tree), **without_cuda)
            self._built[python] = tree
        return self._built[python]
