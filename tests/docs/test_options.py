"""docs/options.md has every option of `zeroopt.wrap`, with its default, and what it is for."""

from __future__ import annotations

import ast
import inspect
import re

from pages import snippets
from paths import ROOT

import zeroopt

PAGE = ROOT / "docs" / "options.md"
OPTIONS = {
    name: p for name, p in inspect.signature(zeroopt.wrap).parameters.items() if name not in ("model", "optimizer")
}


def test_all_are_listed_with_their_defaults() -> None:
    [listing] = snippets(PAGE)
    call = ast.parse(listing).body[0]
    assert isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)
    listed = {keyword.arg: ast.unparse(keyword.value) for keyword in call.value.keywords}
    assert listed == {
        name: str(p.default) if "torch" in str(p.default) else repr(p.default) for name, p in OPTIONS.items()
    }


def test_each_is_for_something() -> None:
    by_purpose, _, _ = PAGE.read_text().partition("## One by one")
    assert set(OPTIONS) <= set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", by_purpose))))
