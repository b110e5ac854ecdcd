"""What is trained on, and how it is varied: scikit-learn's digits, or a folder of images of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from recipes.digits import CLASSES, Digits, load_digits, place, uniform
from zeroopt.data import GlobalBatchSampler

Sample = tuple[Tensor, int]
"""An image (channels, size, size) in [0, 1], and its class."""


@dataclass(frozen=True)
class Images:
    """What to train on, and what to test with.

    Attributes:
        guess: the accuracy, on the test images, of who knows little: see `guessed_by`.
        mirrored: whether an image's mirror image is of its class.
    """

    training: Dataset[Sample]
    test: Dataset[Sample]
    classes: int
    channels: int
    guess: float
    guessed_by: str
    mirrored: bool


class Enlarged(Dataset[Sample]):
    """Digits, as images of `size` by `size` pixels."""

    def __init__(self, digits: Digits, size: int) -> None:
        self.images = F.interpolate(digits.images, (size, size), mode="bilinear")
        self.labels = digits.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], self.labels[index]


class Folder(Dataset[Sample]):
    """Images of a folder that has a folder for each class, cut to squares of `size` by `size` pixels.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, root: Path, size: int) -> None:
        self.size = size
        self.classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        self.samples = [
            (path, label) for label, name in enumerate(self.classes) for path in sorted((root / name).iterdir())
        ]
        if not self.samples:
            raise ValueError(f"expected {root} to have a folder of images for each class, found none")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        shorter = min(image.size)
        left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
        box = (left, top, left + shorter, top + shorter)
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255, label


def load_images(root: Path | None, size: int) -> Images:
    """Digits, or what is in `root/train` and `root/val`.

    Raises:
        ValueError: these have no images, or other classes.
    """
    if root is None:
        training, test = load_digits()
        guess = accuracy_by_means(training, test)
        return Images(
            Enlarged(training, size), Enlarged(test, size), CLASSES, 1, guess, "nearest mean image", mirrored=False
        )
    seen, unseen = Folder(root / "train", size), Folder(root / "val", size)
    if seen.classes != unseen.classes:
        raise ValueError(
            f"expected the same classes in train and val of {root}, got {seen.classes} and {unseen.classes}"
        )
    classes = len(seen.classes)
    return Images(seen, unseen, classes, 3, 1 / classes, "guessing", mirrored=True)


def accuracy_by_means(training: Digits, test: Digits) -> float:
    """Of taking each image for the digit whose mean image is nearest: what pixels say without any learning of what to look at."""
    means = torch.stack([training.images[training.labels == digit].mean(0) for digit in range(CLASSES)])
    nearest = torch.cdist(test.images.flatten(1), means.flatten(1)).argmin(1)
    return (nearest == test.labels).float().mean().item()


def batches(data: Dataset[Sample], batch: int, seed: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each batch of `batch` samples, without end: images and labels."""
    sampler = GlobalBatchSampler(len(data), batch, seed=seed)  # type: ignore[arg-type]
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    while True:
        for one in loader:
            yield one
            sampler.step()


def vary(images: Tensor, generator: torch.Generator, *, mirrored: bool) -> Tensor:
    """The images, each a little larger or smaller, turned, moved and in part covered."""
    count, size = len(images), images.shape[-1]
    varied = place(
        images,
        size,
        scale=uniform(count, 0.85, 1.15, generator),
        x=uniform(count, -0.15, 0.15, generator),
        y=uniform(count, -0.15, 0.15, generator),
        angle=uniform(count, -0.25, 0.25, generator),
    )
    if mirrored:
        varied = torch.where(uniform(count, -1, 1, generator).view(-1, 1, 1, 1) > 0, varied, varied.flip(-1))
    return varied * (1 - squares(count, size, generator))


def squares(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Where each image is covered, (count, 1, size, size): a square of a quarter of its side, anywhere (arXiv 1708.04552)."""
    side = max(1, size // 4)
    pixels = torch.arange(size)
    begins = torch.randint(size, (2, count, 1), generator=generator) - side // 2
    rows, columns = ((pixels >= begins) & (pixels < begins + side)).unbind()
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()
