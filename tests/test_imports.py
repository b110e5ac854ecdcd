"""The order of folders and files: each lists its parts in reading order, and imports run one way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import zeroopt

ROOT = Path(zeroopt.__file__).parent
FOLDERS = sorted(path.parent for path in ROOT.rglob("__init__.py"))


@cache
def listed(folder: Path) -> list[str]:
    """The parts of a folder, as its docstring names them."""
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert doc is not None
    return re.findall(r"^    (\w+)  +\S", doc.partition("In reading order")[2], re.MULTILINE)


def parts(folder: Path) -> set[str]:
    """The parts of a folder, as they lie on the disk."""
    files = {path.stem for path in folder.glob("*.py") if path.name != "__init__.py"}
    return files | {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_lists_each_of_its_parts_once(folder: Path) -> None:
    assert sorted(listed(folder)) == sorted(parts(folder))


@cache
def place(path: Path) -> list[int]:
    """Where a file stands in reading order, a folder's `__init__.py` before its files."""
    where, folder = [], ROOT
    for part in path.relative_to(ROOT).with_suffix("").parts:
        if part != "__init__":
            where.append(listed(folder).index(part))
        folder /= part
    return where


def imported(path: Path) -> Iterator[Path]:
    """The files of the package that a file imports when it runs; types alone do not count."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in for_types:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                yield from (
                    found
                    for found in (base / f"{alias.name}.py", base / alias.name / "__init__.py", base.with_suffix(".py"))
                    if found.exists()
                )
                if (base / "__init__.py").exists() and base != ROOT:
                    yield base / "__init__.py"


def test_imports_run_one_way() -> None:
    against = {
        (name(path), name(other))
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
        for other in imported(path)
        if place(other) >= place(path)
    }
    assert against == set()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__")
