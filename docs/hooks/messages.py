"""`<!-- messages -->` on a page stands for every message of zeroopt's errors, read from the sources, so that a search of the site finds it."""

from __future__ import annotations

import ast
import html
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_MARK = "<!-- messages -->"
_FILLED_IN = "…"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if _MARK not in markdown:
        return markdown
    return markdown.replace(_MARK, _listing(Path(config.config_file_path).parent / "zeroopt"))


def _listing(package: Path) -> str:
    """A section for each class, with its messages module by module."""
    sections = {name: "" for name in _error_classes(package)}
    for file in sorted(package.rglob("*.py")):
        module = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        found = _messages(ast.parse(file.read_text()))
        for name, section in sections.items():
            lines = sorted({f"- {html.escape(text)}\n" for error, text in found if error == name})
            if lines:
                sections[name] = f"{section}\n`{module}`\n\n{''.join(lines)}"
    return "\n".join(f"## {name}\n{section}" for name, section in sections.items() if section)


def _error_classes(package: Path) -> list[str]:
    return [node.name for node in ast.parse((package / "errors.py").read_text()).body if isinstance(node, ast.ClassDef)]


def _messages(tree: ast.AST) -> list[tuple[str, str]]:
    """The name and the message of each error that is made, where the message stands there."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    named = [(_name(call.func), " ".join(_texts(call.args[0])).strip()) for call in calls]
    return [(name, text) for name, text in named if any(letter.isalpha() for letter in text)]


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _texts(message: ast.expr) -> Iterator[str]:
    """The message with … for what is filled in; of one that is put together, what stands there of it."""
    if isinstance(message, ast.Constant):
        yield str(message.value)
    elif isinstance(message, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else _FILLED_IN for part in message.values)
    elif isinstance(message, ast.BinOp):
        yield from _texts(message.left)
        yield from _texts(message.right)
    else:
        yield _FILLED_IN
