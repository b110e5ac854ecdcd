"""What there is to see, the words for it, and pictures of it: two digits, of two sizes, beside or above one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from recipes.digits import Digits, place, uniform

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HEIGHTS = {"small": 0.38, "large": 0.5}  # as parts of the canvas's
RELATIONS = {"left of": "right of", "above": "below"}  # and what they are called from the other side
JITTER = 0.15  # how far digits are from the line through the middle, at most

BEGIN, END = 0, 1  # the first two tokens
WORDS = ("<begin>", "<end>", "a", *HEIGHTS, *NUMBERS, "left", "right", "above", "below", "of")
TOKENS = {word: token for token, word in enumerate(WORDS)}
LENGTH = 10  # tokens of the longest caption, with BEGIN and END


@dataclass(frozen=True)
class Scene:
    """The digit `first` is `relation` the digit `second`."""

    first: int
    first_height: str
    relation: str
    second: int
    second_height: str

    def captions(self) -> tuple[str, str]:
        """From either side. Both are right."""
        first = f"a {self.first_height} {NUMBERS[self.first]}"
        second = f"a {self.second_height} {NUMBERS[self.second]}"
        return f"{first} {self.relation} {second}", f"{second} {RELATIONS[self.relation]} {first}"


SCENES = tuple(Scene(*values) for values in product(range(10), HEIGHTS, RELATIONS, range(10), HEIGHTS))


def split_scenes(held_out: int = 10) -> tuple[list[Scene], list[Scene]]:
    """Scenes to train with, and others: one of so many, by digits and relation, which never come in training in any size."""
    unseen = [is_held_out(scene, held_out) for scene in SCENES]
    return (
        [scene for scene, held in zip(SCENES, unseen, strict=True) if not held],
        [scene for scene, held in zip(SCENES, unseen, strict=True) if held],
    )


def is_held_out(scene: Scene, held_out: int) -> bool:
    return (scene.first + 3 * scene.second + 5 * list(RELATIONS).index(scene.relation)) % held_out == 0


def encode(captions: Iterable[str]) -> Tensor:
    """(captions, LENGTH) tokens: BEGIN, the words, and END as often as there is room."""
    rows = [[BEGIN, *(TOKENS[word] for word in caption.split())] for caption in captions]
    return torch.tensor([row + [END] * (LENGTH - len(row)) for row in rows])


def decode(tokens: Tensor) -> str:
    """The words between BEGIN and END, of one caption (length,)."""
    words = []
    for token in tokens[1:].tolist():
        if token == END:
            break
        words.append(WORDS[token] if token < len(WORDS) else "?")
    return " ".join(words)


class Painter:
    """Draws scenes, each with digits that are drawn at random among those that people wrote."""

    def __init__(self, digits: Digits, size: int) -> None:
        self.digits, self.size = digits, size
        self.written = [(digits.labels == digit).nonzero().flatten() for digit in range(10)]

    def paint(self, scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
        """(scenes, 1, size, size)."""
        beside = torch.tensor([scene.relation == "left of" for scene in scenes])
        first = self._one([s.first for s in scenes], [s.first_height for s in scenes], -1, beside, generator)
        second = self._one([s.second for s in scenes], [s.second_height for s in scenes], 1, beside, generator)
        return torch.maximum(first, second)

    def _one(
        self, numbers: list[int], heights: list[str], side: int, beside: Tensor, generator: torch.Generator
    ) -> Tensor:
        """One digit of each scene, left or above (`side` -1), or right or below (1)."""
        count = len(numbers)
        scale = torch.tensor([HEIGHTS[height] for height in heights])
        along = side * (scale + (1 - 2 * scale) * uniform(count, 0, 1, generator))
        across = uniform(count, -JITTER, JITTER, generator)
        x, y = torch.where(beside, along, across), torch.where(beside, across, along)
        images = self.digits.images[[self._pick(number, generator) for number in numbers]]
        return place(images, self.size, scale=scale, x=x, y=y, angle=uniform(count, -0.1, 0.1, generator))

    def _pick(self, number: int, generator: torch.Generator) -> int:
        written = self.written[number]
        return int(written[torch.randint(len(written), (), generator=generator)])
