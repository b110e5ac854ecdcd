"""Sentences of SciPy's documentation: many without labels, and of others which of its parts they are about.

SciPy comes with scikit-learn. Nothing is imported to read it: docstrings are found in the sources' text.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.text import PAD_ID, sources_in

DOMAINS = (
    *("integrate", "interpolate", "io", "linalg", "ndimage", "optimize", "signal", "sparse", "spatial", "special"),
    "stats",
)
TESTED = 100  # texts of each domain at most
SHORTEST = 40  # characters of a text that has a label
FEWEST_WORDS = 5  # of a paragraph
DOCUMENTED = re.compile(
    r'^ *(?:def|class) \w+(?:\([^)]*\))?[^\n]*:\n\s+[rR]?"""(?P<doc>.+?)"""', re.MULTILINE | re.DOTALL
)
NO_PROSE = re.compile(r"^ *[-=~]{3,} *$|>>>|^\.\. ", re.MULTILINE)  # headings, examples, directives
PROSE = re.compile(r"[A-Z].*[.:]")

Text = tuple[str, int]
"""And the number of its domain."""


@dataclass(frozen=True)
class Domains:
    """What is known of them.

    Attributes:
        unlabelled: prose of all parts, without the docstrings that are tested.
        pool: texts of which a few are given labels.
        tested: texts to see what has been learned.
    """

    unlabelled: list[str]
    pool: list[Text]
    tested: list[Text]

    def label(self, count: int, seed: int) -> list[Text]:
        """So many texts of each domain, drawn at random."""
        drawn = random.Random(seed)
        by_domain = ([text for text in self.pool if text[1] == domain] for domain in range(len(DOMAINS)))
        return [text for texts in by_domain for text in drawn.sample(texts, count)]


@cache
def read_domains() -> Domains:
    """A text is what a docstring begins with, two paragraphs of it. Half of each domain's may be tested."""
    docstrings = {
        paragraphs[0].split(". ")[0]: (part, paragraphs) for part, paragraphs in read_prose()
    }  # by first sentence
    texts = [
        (" ".join(paragraphs[:2]), DOMAINS.index(part)) for part, paragraphs in docstrings.values() if part in DOMAINS
    ]
    long = [text for text in texts if len(text[0]) >= SHORTEST]
    random.Random(0).shuffle(long)
    by_domain = [[text for text in long if text[1] == domain] for domain in range(len(DOMAINS))]
    tested = [text for of_domain in by_domain for text in of_domain[::2][:TESTED]]
    unseen = {text for text, _ in tested}
    return Domains(
        [" ".join(paragraphs) for _, paragraphs in docstrings.values() if " ".join(paragraphs[:2]) not in unseen],
        [text for of_domain in by_domain for text in of_domain[1::2]],
        tested,
    )


def read_prose() -> Iterator[tuple[str, list[str]]]:
    """Of each docstring in SciPy, which part it is of, and its paragraphs in small letters.

    Raises:
        ModuleNotFoundError: SciPy is not installed.
    """
    scipy = find_spec("scipy")
    if scipy is None or scipy.origin is None:
        raise ModuleNotFoundError("there is no text to learn from: install scipy")
    root = Path(scipy.origin).parent
    for path in sources_in(root):
        for match in DOCUMENTED.finditer(path.read_text(encoding="utf-8", errors="ignore")):
            paragraphs = prose_of(match["doc"])
            if paragraphs:
                yield path.relative_to(root).parts[0], paragraphs


def prose_of(docstring: str) -> list[str]:
    """Its paragraphs, without headings, lists of arguments and examples."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    plain = [" ".join(paragraph.split()) for paragraph in paragraphs if not NO_PROSE.search(paragraph)]
    return [text.lower() for text in plain if PROSE.fullmatch(text) and len(text.split()) >= FEWEST_WORDS]


class Labelled(NamedTuple):
    """Tokens [texts, length], where they are words rather than padding, and labels [texts]."""

    tokens: Tensor
    words: Tensor
    labels: Tensor


def encode_texts(tokenizer: Tokenizer, texts: Iterable[Text], length: int) -> Labelled:
    """Texts' first tokens."""
    texts = list(texts)
    rows = [one.ids[:length] for one in tokenizer.encode_batch([text for text, _ in texts])]
    tokens = torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])
    return Labelled(tokens, tokens.ne(PAD_ID), torch.tensor([label for _, label in texts]))
