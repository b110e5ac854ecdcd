"""The Python in a page of Markdown."""

from __future__ import annotations

import re
from pathlib import Path


def snippets(page: Path) -> list[str]:
    """The blocks marked as Python, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
