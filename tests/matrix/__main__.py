"""`python -m tests.matrix`: the quick suite with each torch and each Python, and a table of what has come of it."""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from tests.matrix.cells import PYTHONS, TORCHES, Cell, cells
from tests.matrix.suite import Outcome, run_cell
from tests.matrix.table import table
from tests.matrix.trees import Trees
from tests.matrix.uv import Uv
from tests.support.paths import ROOT
from wheels.interpreters import find_interpreter


def main() -> int:
    """The exit status: 0 where all that could be tried has passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--torch", nargs="+", default=list(TORCHES), help="releases (default: %(default)s)")
    parser.add_argument("--python", nargs="+", default=list(PYTHONS), help="versions (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="of environments and logs")
    args = parser.parse_args()
    if find_spec("uv") is None:
        parser.error("there is no uv, which makes the environments: pip install uv")
    outcomes = try_all(list(cells(args.torch, args.python)), args.folder.resolve())
    print(f"\n{table(outcomes)}")
    return int(not outcomes or not all(outcome.good for outcome in outcomes.values()))


def try_all(chosen: list[Cell], folder: Path) -> dict[Cell, Outcome]:
    """What has come of the cells whose Python is on this machine."""
    pythons = {version: find_interpreter(version) for version in sorted({cell.python for cell in chosen})}
    for version in [version for version, found in pythons.items() if found is None]:
        print(f"Python {version} is left out: there is no python{version}, neither on PATH nor of pyenv's", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    cache = folder / "cache"
    trees = Trees(folder)
    outcomes = {}
    for _, row in groupby(chosen, key=lambda cell: cell.torch):
        for cell in row:
            python = pythons[cell.python]
            if python is not None:
                log = folder / f"{cell}.log"
                log.unlink(missing_ok=True)
                outcomes[cell] = run_cell(cell, python.path, folder, Uv(cache, log), trees)
                print(f"torch {cell.torch:8} Python {cell.python:6} {outcomes[cell]} ({log})", flush=True)
        shutil.rmtree(cache, ignore_errors=True)  # gigabytes for each torch
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
