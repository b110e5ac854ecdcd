"""Residual networks (He et al. 2016, arXiv 1512.03385), with the stride in the 3 by 3 convolution of a bottleneck."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]
"""Makes the normalisation of so many channels."""


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)


class Residual(nn.Module):
    """What comes in, added to what convolutions make of it."""

    expansion: int  # channels that go out, of each of `width`

    def __init__(self, body: nn.Sequential, channels_in: int, channels_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(conv(channels_in, channels_out, 1, stride), norm(channels_out))
        last_norm = body[-1]
        assert isinstance(last_norm.weight, nn.Parameter)
        nn.init.zeros_(last_norm.weight)  # each block begins as the identity (arXiv 1706.02677, 5.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.body(x))


class Basic(Residual):
    """Two 3 by 3 convolutions: ResNet-18 and 34."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int, norm: Norm) -> None:
        body = nn.Sequential(
            *(conv(channels_in, width, 3, stride), norm(width), nn.ReLU(inplace=True)),
            *(conv(width, width, 3), norm(width)),
        )
        super().__init__(body, channels_in, width, stride, norm)


class Bottleneck(Residual):
    """A 3 by 3 convolution between two that change the number of channels: ResNet-50 and deeper."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int, norm: Norm) -> None:
        channels_out = self.expansion * width
        body = nn.Sequential(
            *(conv(channels_in, width, 1), norm(width), nn.ReLU(inplace=True)),
            *(conv(width, width, 3, stride), norm(width), nn.ReLU(inplace=True)),
            *(conv(width, channels_out, 1), norm(channels_out)),
        )
        super().__init__(body, channels_in, channels_out, stride, norm)


class ResNet(nn.Module):
    """Images (batch, channels, height, width) as logits (batch, classes).

    Args:
        block: `Basic` or `Bottleneck`.
        depths: blocks in each part; each part but the first begins with half the height and width.
        width: channels in the first part; each further one has twice as many.
        small: for images of some tens of pixels: no stride and no pooling before the first part.
    """

    def __init__(
        self,
        block: type[Basic | Bottleneck],
        depths: tuple[int, ...],
        classes: int,
        *,
        channels: int = 3,
        width: int = 64,
        norm: Norm = nn.BatchNorm2d,
        small: bool = False,
    ) -> None:
        super().__init__()
        stem = [conv(channels, width, 3) if small else conv(channels, width, 7, 2), norm(width), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*stem, nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1))
        self.parts = nn.Sequential()
        channels_in = width
        for part, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if part > 0 and i == 0 else 1
                self.parts.append(block(channels_in, width << part, stride, norm))
                channels_in = block.expansion * (width << part)
        self.head = nn.Linear(channels_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.parts(self.stem(images)).mean((2, 3)))
        return logits
