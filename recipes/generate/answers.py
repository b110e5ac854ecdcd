"""Questions and answers: what a function of the standard library does, as its docstring says in a line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.generate.model import IGNORED
from recipes.text import END_ID, Docstring

LONGEST = 160  # characters of an answer


@dataclass(frozen=True)
class Pair:
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"


def pairs_of(docstrings: Iterable[Docstring]) -> list[Pair]:
    return [
        Pair(f"What does {docstring.signature} of {docstring.module} do?", docstring.summary)
        for docstring in docstrings
        if docstring.signature.endswith(")") and 10 <= len(docstring.summary) <= LONGEST
    ]


def encode_pairs(tokenizer: Tokenizer, pairs: Iterable[Pair], context: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, [pairs, context] each. Only answers are to be learned; pairs that are too long are left out."""
    rows = []
    for pair in pairs:
        prompt = tokenizer.encode(pair.prompt).ids
        answer = [*tokenizer.encode(f" {pair.answer}").ids, END_ID]
        tokens = prompt + answer
        unused = context + 1 - len(tokens)
        if unused >= 0:
            targets = [IGNORED] * (len(prompt) - 1) + answer
            rows.append((tokens[:-1] + [END_ID] * unused, targets + [IGNORED] * unused))
    return torch.tensor([tokens for tokens, _ in rows]), torch.tensor([targets for _, targets in rows])
