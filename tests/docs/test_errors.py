"""docs/errors.md has an entry for each public class, and quotes messages that there are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT

import zeroopt
from zeroopt import errors

PAGE = (ROOT / "docs" / "errors.md").read_text()
PUBLIC = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
SHORTEST = 8  # characters of a quotation that say something


def sections() -> dict[str, str]:
    """What the page says under each heading."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def texts(node: ast.AST) -> Iterator[str]:
    """The strings in a piece of code, with … for what is filled in."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            yield "".join(str(value.value) if isinstance(value, ast.Constant) else "…" for value in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


@cache
def messages() -> str:
    folder = Path(zeroopt.__file__).parent
    return "\n".join(text for file in folder.rglob("*.py") for text in texts(ast.parse(file.read_text())))


def quoted() -> Iterator[str]:
    """The pieces between what is filled in, of the messages in the first column of the tables of zeroopt's own errors."""
    for heading, section in sections().items():
        if heading not in PUBLIC:
            continue
        for row in re.findall(r"^\| (.*?) \| ", section, re.MULTILINE):
            for quotation in re.findall(r"`([^`]+)`", row):
                yield from (piece.strip() for piece in re.split(r"…| / |\b[NX]\b", quotation))


def test_each_public_error_has_an_entry() -> None:
    assert set(PUBLIC) <= set(sections())


@pytest.mark.parametrize("piece", sorted({piece for piece in quoted() if len(piece) >= SHORTEST}))
def test_what_is_quoted_is_a_message(piece: str) -> None:
    assert piece in messages()
