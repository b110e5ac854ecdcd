"""How large a network, of which images, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from recipes.see.norms import NORMS
from recipes.see.resnet import Basic, Bottleneck, Norm, ResNet
from recipes.vit import ViT

MakeModel = Callable[[int, int, int, Norm], nn.Module]
"""A network for so many classes and channels, of images of so many pixels, with such norms."""


@dataclass(frozen=True)
class Preset:
    """A network, and how it is trained.

    Called, it gives the network for ImageNet's classes, and images of one rank for it, as `python -m zeroopt estimate --model` wants them.

    Attributes:
        size: of an image, in pixels.
        batch: images of a step, on all ranks together.
        rate: learning rate at its highest, for this batch.
        decay: weight decay, of matrices and convolutions.
        sgd: SGD with Nesterov's momentum, as residual networks are trained; else AdamW, as transformers are.
        average: how much of the averaged weights a step keeps.
        fused: of `zeroopt.wrap`. False: torch's own step, by which two ranks on CPUs have DDP's very bits, step after step.
        rank_batch: images of a rank, in estimates.
    """

    make: MakeModel
    size: int
    batch: int
    steps: int
    rate: float
    decay: float
    sgd: bool
    average: float = 0.9999
    fused: Literal["auto", False] = "auto"
    rank_batch: int = 32

    def __call__(self) -> tuple[nn.Module, Tensor]:
        return self.make(1000, 3, self.size, NORMS["batch"]), torch.zeros(self.rank_batch, 3, self.size, self.size)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Norms, biases and positions are not decayed."""
        parameters = dict(model.named_parameters())
        others = [value for name, value in parameters.items() if value.dim() < 2 or name.endswith("positions")]
        decayed = [value for value in parameters.values() if all(value is not other for other in others)]
        groups = [{"params": decayed, "weight_decay": self.decay}, {"params": others, "weight_decay": 0.0}]
        if self.sgd:
            return torch.optim.SGD(groups, lr=self.rate, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.rate)


def resnet(
    block: type[Basic | Bottleneck],
    depths: tuple[int, ...],
    classes: int,
    channels: int,
    size: int,
    norm: Norm,
    width: int = 64,
) -> nn.Module:
    return ResNet(block, depths, classes, channels=channels, width=width, norm=norm, small=size <= 64)


class Classifier(nn.Sequential):
    """A vision transformer, whose first token says what is seen."""

    def __init__(self, trunk: ViT, classes: int) -> None:
        super().__init__(trunk, nn.Linear(trunk.width, classes))

    def forward(self, images: Tensor) -> Tensor:
        trunk, head = self
        logits: Tensor = head(trunk(images)[:, 0])
        return logits


def vit(
    patch: int,
    layers: int,
    width: int,
    heads: int,
    classes: int,
    channels: int,
    size: int,
    norm: Norm,
    *,
    convolved: bool = False,
    recomputed: bool = False,
) -> nn.Module:
    """It has norms of its own."""
    trunk = ViT(size, patch, layers, width, heads, channels=channels, convolved=convolved, recomputed=recomputed)
    return Classifier(trunk, classes)


def of_imagenet(make: MakeModel, *, sgd: bool, batch: int = 1024, epochs: int = 90) -> Preset:
    """As the papers train them, but for what they do to images."""
    steps = epochs * 1_281_167 // batch
    return Preset(
        make,
        224,
        batch,
        steps,
        rate=1e-4 * batch / 256 if not sgd else 0.1 * batch / 256,
        decay=5e-5 if sgd else 0.3,
        sgd=sgd,
    )


RESNET_TINY = Preset(
    partial(resnet, Basic, (2, 2, 2, 2), width=16), 8, 64, 200, rate=0.1, decay=5e-4, sgd=True, average=0.9, fused=False
)
VIT_TINY = Preset(
    partial(vit, 2, 4, 64, 4, convolved=True), 8, 64, 500, rate=2e-3, decay=0.05, sgd=False, average=0.9, fused=False
)
RESNET_18 = of_imagenet(partial(resnet, Basic, (2, 2, 2, 2)), sgd=True)
RESNET_34 = of_imagenet(partial(resnet, Basic, (3, 4, 6, 3)), sgd=True)
RESNET_50 = of_imagenet(partial(resnet, Bottleneck, (3, 4, 6, 3)), sgd=True)
RESNET_101 = of_imagenet(partial(resnet, Bottleneck, (3, 4, 23, 3)), sgd=True)
RESNET_152 = of_imagenet(partial(resnet, Bottleneck, (3, 8, 36, 3)), sgd=True)
VIT_S16 = of_imagenet(partial(vit, 16, 12, 384, 6), sgd=False, epochs=300)
VIT_B16 = of_imagenet(partial(vit, 16, 12, 768, 12), sgd=False, epochs=300)
VIT_L16 = of_imagenet(partial(vit, 16, 24, 1024, 16), sgd=False, epochs=300)
VIT_H14 = of_imagenet(partial(vit, 14, 32, 1280, 16, recomputed=True), sgd=False, epochs=300)

PRESETS = {
    "resnet-tiny": RESNET_TINY,
    "vit-tiny": VIT_TINY,
    "resnet18": RESNET_18,
    "resnet34": RESNET_34,
    "resnet50": RESNET_50,
    "resnet101": RESNET_101,
    "resnet152": RESNET_152,
    "vit-s16": VIT_S16,
    "vit-b16": VIT_B16,
    "vit-l16": VIT_L16,
    "vit-h14": VIT_H14,
}
