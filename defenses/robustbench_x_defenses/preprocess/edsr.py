"""EDSR-baseline (Lim et al. 2017), doubling the size of an image."""

from typing import final

import torch
from torch import Tensor, nn

__all__ = ["Edsr"]

_WIDTH, _BLOCKS = 64, 16
_DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


@final
class Edsr(nn.Module):
    """The x2 baseline network of EDSR-PyTorch, with its names, so that its state dict fits.

    16 residual blocks of 64 channels, then a sub-pixel convolution; about 1.4 million weights. The constant mean shifts
    before and after (`sub_mean`, `add_mean` there) are no weights here.
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(_conv(3, _WIDTH))
        self.body = nn.Sequential(*[_Block() for _ in range(_BLOCKS)], _conv(_WIDTH, _WIDTH))
        self.tail = nn.Sequential(nn.Sequential(_conv(_WIDTH, 4 * _WIDTH), nn.PixelShuffle(2)), _conv(_WIDTH, 3))
        self.register_buffer("mean", 255 * torch.tensor(_DIV2K_MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(N, 3, 2H, 2W)` from `(N, 3, H, W)` in [0, 1]; not clipped."""
        shallow = self.head(255 * images - self.mean)
        large: Tensor = self.tail(shallow + self.body(shallow))
        return (large + self.mean) / 255


@final
class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(_WIDTH, _WIDTH), nn.ReLU(), _conv(_WIDTH, _WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = features + self.body(features)
        return out


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
