"""What is asked of a picture of a digit, and how good an answer is: four tasks with heads, targets and losses of their own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.digits import CLASSES, Digits, place, uniform
from recipes.vit import ViT

SMALLEST, LARGEST = 0.65, 1.0  # height of a digit as a part of the canvas's


class Task(ABC):
    """One of the things to learn.

    Attributes:
        name: of its head.
        measure: what `score` is called.
        higher_is_better: whether a high score is.
    """

    name: str
    measure: str
    higher_is_better = True

    def __init__(self, trunk: ViT, size: int, patch: int) -> None:
        """
        Args:
            trunk: whose tokens the head reads.
            size: of a canvas, in pixels.
            patch: side of the squares that the trunk cuts it into.
        """
        self.size, self.patch = size, patch
        self.head = self.make_head(trunk.width)

    @abstractmethod
    def make_head(self, width: int) -> nn.Module:
        """From the trunk's tokens (batch, 1 + patches, width) to an answer."""

    @abstractmethod
    def pose(self, digits: Digits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (n, 1, size, size) of these digits, and what is to be found out about each (n, ...)."""

    @abstractmethod
    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """The mean over the pictures."""

    @abstractmethod
    def score(self, answers: Tensor, targets: Tensor) -> Tensor:
        """The mean over the pictures of what people want to know."""

    @abstractmethod
    def guess(self, targets: Tensor) -> Tensor:
        """The best answers that can be given without a look at the pictures."""


class OfWhole(nn.Module):
    """Answers with so many numbers, by the token of the whole picture."""

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, numbers))

    def forward(self, tokens: Tensor) -> Tensor:
        numbers: Tensor = self.layers(tokens[:, 0])
        return numbers


class OfPatches(nn.Module):
    """Answers with so many numbers for each patch."""

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, numbers))

    def forward(self, tokens: Tensor) -> Tensor:
        numbers: Tensor = self.layers(tokens[:, 1:])
        return numbers


class Choice(Task):
    """One of some answers is right."""

    measure = "accuracy"
    choices: int

    def make_head(self, width: int) -> nn.Module:
        return OfWhole(width, self.choices)

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(answers, targets)

    def score(self, answers: Tensor, targets: Tensor) -> Tensor:
        return (answers.argmax(1) == targets).float().mean()

    def guess(self, targets: Tensor) -> Tensor:
        """The most frequent one."""
        most = targets.bincount(minlength=self.choices).argmax()
        return F.one_hot(most, self.choices).float().expand(len(targets), -1)


class Read(Choice):
    """Which digit it is."""

    name = "read"
    choices = CLASSES

    def pose(self, digits: Digits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pictures, _ = scatter(digits.images, self.size, generator)
        return pictures, digits.labels


class Turn(Choice):
    """By how many quarters it has been turned: labels that cost nothing (arXiv 1803.07728)."""

    name = "turn"
    choices = 4

    def pose(self, digits: Digits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        quarters = torch.randint(self.choices, (len(digits),), generator=generator)
        pictures, _ = scatter(digits.images, self.size, generator, angle=quarters * (math.pi / 2))
        return pictures, quarters


class Find(Task):
    """Where it is, and how large: its centre, from -1 to 1, and its height as a part of the canvas's."""

    name = "find"
    measure = "distance"
    higher_is_better = False

    def make_head(self, width: int) -> nn.Module:
        return OfWhole(width, 3)

    def pose(self, digits: Digits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return scatter(digits.images, self.size, generator)

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(answers, targets, beta=0.1)

    def score(self, answers: Tensor, targets: Tensor) -> Tensor:
        """How far the centres are from where they are, in halves of the canvas."""
        return (answers[:, :2] - targets[:, :2]).square().sum(1).sqrt().mean()

    def guess(self, targets: Tensor) -> Tensor:
        return targets.mean(0).expand_as(targets)


class Restore(Task):
    """What is in the patches that have been covered, half of them (arXiv 2111.06377). Targets are pixels, and not a number where seen."""

    name = "restore"
    measure = "error"
    higher_is_better = False

    def make_head(self, width: int) -> nn.Module:
        return OfPatches(width, self.patch**2)

    def pose(self, digits: Digits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pictures, _ = scatter(digits.images, self.size, generator)
        patches = F.unfold(pictures, self.patch, stride=self.patch).transpose(1, 2)
        order = torch.rand(patches.shape[:2], generator=generator).argsort(1)
        covered = (order < patches.shape[1] // 2)[..., None]
        seen = patches.masked_fill(covered, 0.5).transpose(1, 2)
        canvas = F.fold(seen, (self.size, self.size), self.patch, stride=self.patch)
        return canvas, patches.masked_fill(~covered, math.nan)

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        covered = ~targets.isnan()
        return F.mse_loss(answers[covered], targets[covered])

    def score(self, answers: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error of covered pixels."""
        return self.loss(answers, targets)

    def guess(self, targets: Tensor) -> Tensor:
        return targets.nanmean().expand_as(targets)


TASKS: tuple[type[Task], ...] = (Read, Turn, Find, Restore)


def scatter(
    images: Tensor, size: int, generator: torch.Generator, *, angle: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each image somewhere on a canvas of its own, wholly in it, and where: (n, 3), centre and height."""
    count = len(images)
    scale = uniform(count, SMALLEST, LARGEST, generator)
    x, y = uniform(2 * count, -1, 1, generator).view(2, count) * (1 - scale)
    angle = torch.zeros(count) if angle is None else angle
    return place(images, size, scale=scale, x=x, y=y, angle=angle), torch.stack([x, y, scale], 1)
