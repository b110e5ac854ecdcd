"""`*.md` in the navigation stands for all pages of that folder that no other entry names, so that a new page needs no entry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    if config.nav is not None:
        named = {entry for entry in _entries(config.nav) if "*" not in entry}
        config.nav = _expand(config.nav, Path(config.docs_dir), named)
    return config


def _entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for inner in nav.values() if isinstance(nav, dict) else nav:
            yield from _entries(inner)


def _expand(entries: list[Any], docs: Path, named: set[str]) -> list[Any]:
    """The same with pages in the place of patterns, and without sections that have none."""
    expanded: list[Any] = []
    for entry in entries:
        if isinstance(entry, str) and "*" in entry:
            expanded += sorted({path.relative_to(docs).as_posix() for path in docs.glob(entry)} - named)
        elif isinstance(entry, dict):
            [(title, inner)] = entry.items()
            section = _expand(inner, docs, named) if isinstance(inner, list) else inner
            if section:
                expanded.append({title: section})
        else:
            expanded.append(entry)
    return expanded
