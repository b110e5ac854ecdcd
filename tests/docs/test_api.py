"""The pages of docs/api/ have every public name."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
from paths import ROOT

TEXT = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
MODULES = (
    "zeroopt",
    "zeroopt.checkpoint",
    "zeroopt.data",
    "zeroopt.elastic",
    "zeroopt.optim",
    "zeroopt.planner",
    "zeroopt.simulator",
)


@pytest.mark.parametrize("module", MODULES)
def test_all_names_are_there(module: str) -> None:
    rendered = set(re.findall(r"^::: \S*?(\w+)$", TEXT, re.MULTILINE))
    mentioned = set(re.findall(r"zeroopt\.(\w+)", TEXT))
    whole = {"zeroopt.errors"} & set(re.findall(r"^::: (\S+)$", TEXT, re.MULTILINE))
    errors = {name for place in whole for name in vars(import_module(place)) if name.endswith("Error")}
    assert set(import_module(module).__all__) <= rendered | mentioned | errors
