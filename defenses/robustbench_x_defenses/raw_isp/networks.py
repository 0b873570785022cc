"""The learned maps: F from RGB to packed RAW, and the small G back to RGB."""

import itertools
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RawMapper", "SmallISP"]


@final
class RawMapper(nn.Module):
    """F of Zhang et al. (2022): five 3 x 3 convolutions, 3-64-64-64-64-4, ReLU after each; 114,884 parameters.

    `(N, 3, H, W)` RGB in [0, 1] to packed RAW `(N, 4, H, W)` (see `bayer`), never negative. Zero padding, no
    normalisation, no skip, so an image's result depends on nothing but the image.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 64, 64, 64, 4)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        # A last ReLU over a start below zero would never wake: the output starts at mid-grey.
        nn.init.constant_(self.layers[-1].bias, 0.25)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Packed RAW."""
        for layer in self.layers:
            images = F.relu(layer(images))
        return images


@final
class SmallISP(nn.Module):
    """The default G: a U-Net at half resolution and below, 1.1 M parameters; ours, in place of the 47 M PyNET.

    Packed RAW `(N, 4, H, W)` to RGB `(N, 3, H, W)` in [0, 1]; H and W are multiples of 8. The sites are rearranged
    (pixel unshuffle) before the first convolution and the colours after the last, so no detail is dropped by pooling.
    No normalisation: batch and precision change nothing but rounding.
    """

    multiple = least = 8

    def __init__(self) -> None:
        super().__init__()
        self.down0 = _pair(16, 48)
        self.down1 = _pair(48, 96)
        self.down2 = _pair(96, 160)
        self.middle = nn.Conv2d(160, 160, 3, padding=1)
        self.up1 = _pair(160 + 96, 96)
        self.up0 = _pair(96 + 48, 48)
        self.last = nn.Conv2d(48, 12, 3, padding=1)

    def forward(self, raw: Tensor) -> Tensor:
        """RGB; a sigmoid bounds it, as in PyNET."""
        first = self.down0(F.pixel_unshuffle(raw, 2))
        second = self.down1(F.avg_pool2d(first, 2))
        deepest = self.down2(F.avg_pool2d(second, 2))
        deepest = deepest + F.leaky_relu(self.middle(deepest), 0.2)
        second = self.up1(torch.cat([_doubled(deepest), second], dim=1))
        first = self.up0(torch.cat([_doubled(second), first], dim=1))
        return F.pixel_shuffle(self.last(first), 2).sigmoid()


def _pair(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(outside, outside, 3, padding=1),
        nn.LeakyReLU(0.2),
    )


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
