"""The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): the trunk of several recipes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recipes.transformer import Blocks, draw_weights


class ViT(nn.Module):
    """Square images (batch, channels, size, size) as tokens (batch, 1 + patches, width); the first is the whole image's.

    Args:
        size: of an image, in pixels.
        patch: side of the squares that it is cut into, in pixels.
        convolved: whether several small convolutions look at patches and beyond, rather than one that sees each alone: what has few
            images learns faster by it (Xiao et al. 2021, arXiv 2106.14881). `patch` is a power of two then.
        recomputed: whether activations of blocks are computed once more in backward, rather than kept.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        layers: int,
        width: int,
        heads: int,
        *,
        channels: int = 1,
        convolved: bool = False,
        recomputed: bool = False,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"expected an image that patches of {patch} pixels divide evenly, got {size} pixels")
        self.width = width
        self.patches = (size // patch) ** 2
        if convolved:
            self.embed: nn.Module = convolutions(channels, width, patch)
        else:
            self.embed = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.whole = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.empty(1 + self.patches, width))
        self.blocks = Blocks(layers, width, heads, causal=False, recomputed=recomputed)
        self.norm = nn.LayerNorm(width)
        self.apply(draw_weights)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images.to(self.positions.dtype)).flatten(2).transpose(1, 2)
        whole = self.whole.expand(len(images), 1, self.width)
        tokens: Tensor = self.norm(self.blocks(torch.cat([whole, patches], dim=1) + self.positions))
        return tokens


def convolutions(channels: int, width: int, patch: int) -> nn.Sequential:
    """Images to a place of `width` channels for each patch: the last of the convolutions, and one for each factor of two before it, halve
    height and width.

    Raises:
        ValueError: `patch` is no power of two.
    """
    halvings = patch.bit_length() - 1
    if patch < 2 or patch != 1 << halvings:
        raise ValueError(f"expected a patch of a power of two of pixels for convolutions, got {patch}")
    layers = nn.Sequential()
    for step in range(halvings + 1):
        last = step == halvings
        channels_out = width if last else width >> (halvings - step)
        layers.append(nn.Conv2d(channels, channels_out, 3, stride=1 if step == 0 else 2, padding=1, bias=last))
        if not last:
            layers.extend([nn.GroupNorm(4, channels_out), nn.ReLU(inplace=True)])
        channels = channels_out
    return layers
