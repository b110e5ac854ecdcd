"""The pages of docs/api/ have every public name, and no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from paths import ROOT

TEXT = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
RENDERED = re.findall(r"^::: (\S+)$", TEXT, re.MULTILINE)
INTEGRATIONS = ("accelerate", "axolotl", "lightning", "pytorch_lightning", "transformers")
MODULES = (
    "zeroopt",
    "zeroopt.checkpoint",
    "zeroopt.collectives",
    "zeroopt.data",
    "zeroopt.elastic",
    "zeroopt.feature",
    "zeroopt.ops",
    "zeroopt.optim",
    "zeroopt.planner",
    "zeroopt.simulator",
    "zeroopt.stepping.rules",
    *(f"zeroopt.integrations.{name}" for name in INTEGRATIONS),
)


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public(module: str) -> set[str]:
    """Its `__all__`, read rather than imported: not every framework is installed."""
    for statement in ast.parse(file_of(module).read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return set(ast.literal_eval(statement.value))
    raise AssertionError(f"{module} has no __all__")


def errors() -> set[str]:
    return {
        node.name for node in ast.parse(file_of("zeroopt.errors").read_text()).body if isinstance(node, ast.ClassDef)
    }


@pytest.mark.parametrize("module", MODULES)
def test_all_names_are_there(module: str) -> None:
    rendered = {name.rpartition(".")[2] for name in RENDERED}
    mentioned = set(re.findall(r"zeroopt\.(?:\w+\.)?(\w+)", TEXT))
    whole = public(module) if module in RENDERED else set()
    assert public(module) <= rendered | mentioned | errors() | whole


def test_no_others_are_there() -> None:
    everywhere = {name for module in MODULES for name in public(module)}
    assert {name for name in RENDERED if name.rpartition(".")[2] not in everywhere} == {"zeroopt.errors"}
