"""Text that every Python installation has, and tokens of it: the documentation of its language and its library.

Nothing is imported to read it, and nothing is downloaded: docstrings are found in the sources' text.
"""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

T = TypeVar("T")

PIECE = 10_000  # characters of a file, as a document
SPECIAL_TOKENS = END, PAD, MASK = "<end>", "<pad>", "<mask>"
END_ID, PAD_ID, MASK_ID = range(3)  # the trainer begins with these
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "ensurepip",
    "__pycache__",
}
DOCUMENTED = re.compile(
    r'^ *(?:async )?(?P<kind>def|class) (?P<name>\w+)(?P<arguments>\([^)]*\))?[^\n]*:\n\s+[rR]?"""(?P<doc>[^"\\]+)"""',
    re.MULTILINE,
)


@dataclass(frozen=True)
class Docstring:
    """What a function or a class of the standard library says of itself.

    Attributes:
        package: the first part of its module's name, such as "email".
        module: such as "email.message".
        signature: such as "as_string(unixfrom, maxheaderlen)"; of a class, its name.
    """

    package: str
    module: str
    signature: str
    text: str

    @property
    def summary(self) -> str:
        """Its first paragraph, in one line."""
        return " ".join(self.text.split("\n\n")[0].split())


@cache
def manual() -> tuple[str, ...]:
    """Pages of Python's reference manual, as `help("topics")` has them."""
    return tuple(topics[name] for name in sorted(topics))


@cache
def docstrings() -> tuple[Docstring, ...]:
    """Those of the standard library, each text once, in the order of files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Docstring] = {}
    for path in sources_in(folder):
        source = path.read_text(encoding="utf-8", errors="ignore")
        for docstring in docstrings_of(path.relative_to(folder), source):
            found.setdefault(docstring.text, docstring)
    return tuple(found.values())


def sources_in(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        yield from (Path(place, name) for name in sorted(files) if name.endswith(".py"))


def docstrings_of(path: Path, source: str) -> Iterator[Docstring]:
    parts = path.with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    for match in DOCUMENTED.finditer(source):
        arguments = f"({plain_arguments(match['arguments'] or '')})" if match["kind"] == "def" else ""
        yield Docstring(parts[0], module, match["name"] + arguments, inspect.cleandoc(match["doc"]))


def plain_arguments(source: str) -> str:
    """The names of arguments, without types, defaults and `self`."""
    names = (re.split(r"[:=]", one)[0].strip() for one in source.strip("()").split(","))
    return ", ".join(name for name in names if re.fullmatch(r"\*{0,2}\w+", name) and name not in ("self", "cls"))


def every_tenth(things: Sequence[T]) -> tuple[list[T], list[T]]:
    """What is trained on, and the tenth of it that is held out."""
    return [thing for i, thing in enumerate(things) if i % 10 != 9], list(things[9::10])


def corpus(paths: Iterable[Path] = ()) -> tuple[list[str], list[str]]:
    """Documents to train on and those that are held out: pieces of these files, or if there are none pages of the manual and docstrings,
    each divided by `every_tenth`."""
    own = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    if own:
        return every_tenth([text[begin : begin + PIECE] for text in own for begin in range(0, len(text), PIECE)])
    pages, unseen_pages = every_tenth(manual())
    known, unseen = every_tenth([docstring.text for docstring in docstrings()])
    return pages + known, unseen_pages + unseen


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-pair tokens (arXiv 1508.07909) over bytes, so that every text has some. Collective: rank 0 finds them, and tells.

    Args:
        vocabulary: how many at most, `SPECIAL_TOKENS` included.
    """
    told: list[str] = [""]
    if dist.get_rank() == 0:
        told = [find_tokens(documents, vocabulary).to_str()]
    dist.broadcast_object_list(told)
    return Tokenizer.from_str(told[0])


def find_tokens(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Tensor:
    """All documents' tokens in one row, an END behind each."""
    return torch.tensor([token for one in tokenizer.encode_batch(list(documents)) for token in (*one.ids, END_ID)])
