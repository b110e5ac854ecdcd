"""The Python in a page of Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>.+?) -->\n+)?```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """A block marked as Python.

    Attributes:
        code: what is in it.
        why_not: why it cannot be run by a test, as the comment `<!-- not run: … -->` in front of it says; None where it can.
    """

    code: str
    why_not: str | None


def blocks(page: Path) -> list[Snippet]:
    """The blocks marked as Python, in order."""
    return [Snippet(block["code"], block["why"]) for block in _BLOCK.finditer(page.read_text())]


def snippets(page: Path) -> list[str]:
    """Those of them that a test can run."""
    return [block.code for block in blocks(page) if block.why_not is None]
