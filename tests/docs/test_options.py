"""docs/options.md has every option of `zeroopt.wrap`, with its default, and what it is for."""

from __future__ import annotations

import inspect
import re

from paths import ROOT

import zeroopt

PAGE = ROOT / "docs" / "options.md"
OPTIONS = {
    name: p for name, p in inspect.signature(zeroopt.wrap).parameters.items() if name not in ("model", "optimizer")
}


def test_all_are_listed_with_their_defaults() -> None:
    _, _, one_by_one = PAGE.read_text().partition("## One by one")
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \| ", one_by_one, re.MULTILINE))
    assert listed == {
        name: str(p.default) if "torch" in str(p.default) else repr(p.default).replace("'", '"')
        for name, p in OPTIONS.items()
    }


def test_each_is_for_something() -> None:
    by_purpose, _, _ = PAGE.read_text().partition("## One by one")
    assert set(OPTIONS) <= set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", by_purpose))))
