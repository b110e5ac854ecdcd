"""What is learned: a model, the text it learns, and how long.

A batch is drawn for all ranks and cut, so that the same seed means the same batches on any number of ranks.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.model import make_model
from bench.quality import characters

BYTES = 256  # tokens of real text
CONTEXT = 64
READ = 3_000_000  # bytes of sources


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        pieces: what to train on, and what to validate on: [number, tokens and the ones that follow them].
        loss: of a model, for some pieces.
        batch: pieces a step, over all ranks.
        lr: AdamW's largest.
    """

    make: Callable[[], nn.Module]
    pieces: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, Tensor], Tensor]
    steps: int
    batch: int
    lr: float


def character_pieces() -> tuple[Tensor, Tensor]:
    return characters.windows()[: characters.TRAINING], characters.windows()[characters.TRAINING :]


def loss_of_next_character(model: nn.Module, pieces: Tensor) -> Tensor:
    return functional.cross_entropy(model(pieces[:, :-1]), pieces[:, -1])


def make_gpt() -> nn.Module:
    return make_model(BYTES, CONTEXT, layers=4, width=256)


@cache
def text_pieces() -> tuple[Tensor, Tensor]:
    """Python's documentation and then its own sources, as bytes, in pieces of CONTEXT + 1; every tenth is to validate on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:READ]
    text = bytearray("\n".join(topics.values()).encode() + sources)
    pieces = torch.frombuffer(text, dtype=torch.uint8).unfold(0, CONTEXT + 1, CONTEXT + 1)
    validates = torch.arange(len(pieces)) % 10 == 9
    return pieces[~validates], pieces[validates][:2_000]


def loss_of_text(model: nn.Module, pieces: Tensor) -> Tensor:
    tokens = pieces.long()
    loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])
    return loss


TASKS = {
    "characters": Task(
        characters.LanguageModel, character_pieces, loss_of_next_character, steps=600, batch=128, lr=1e-3
    ),
    "text": Task(make_gpt, text_pieces, loss_of_text, steps=1200, batch=16, lr=1e-3),
}
