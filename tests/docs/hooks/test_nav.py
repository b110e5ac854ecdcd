from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paths import ROOT


def expand(docs: Path, nav: list[Any]) -> Any:
    spec = importlib.util.spec_from_file_location("nav", ROOT / "docs" / "hooks" / "nav.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook.on_config(SimpleNamespace(docs_dir=str(docs), nav=nav)).nav


def test_a_pattern_stands_for_the_pages_that_nobody_names(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    for page in ("index.md", "b.md", "a.md", "recipes/one.md"):
        (tmp_path / page).touch()
    nav = ["index.md", {"Recipes": ["recipes/*.md"]}, {"None": ["none/*.md"]}, {"More": ["*.md", {"A": "b.md"}]}]
    assert expand(tmp_path, nav) == ["index.md", {"Recipes": ["recipes/one.md"]}, {"More": ["a.md", {"A": "b.md"}]}]
