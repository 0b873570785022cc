"""A learned pipeline of PyNET's kind and size: five scales, parallel kernels, coarse to fine."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PyNET"]

_WIDTHS = (32, 64, 128, 256, 512)
_KERNELS = ((3, 5, 7, 9), (3, 5, 7), (3, 5), (3,), (3,))
"""By scale, fine to coarse: a coarse map is too small for a wide kernel."""
_DEPTH = (2, 2, 3, 4, 5)
"""Blocks of each scale, so that the whole is of the published size."""


@final
class PyNET(nn.Module):
    """After Ignatov et al. (2020), at the scale of its input; packed RAW `(N, 4, H, W)` to RGB in [0, 1].

    Written from the published description (five scales of 32 to 512 channels, blocks of parallel 3, 5, 7 and 9 pixel
    branches of two convolutions, reflection padding, LeakyReLU 0.2, affine instance normalisation, bilinear up):
    of the same kind, not weight for weight the released network, whose checkpoints do not load. H and W are
    multiples of 16, and at least 32. Instance normalisation keeps no running statistics, so an image's result does
    not depend on the batch.
    """

    multiple, least = 16, 32

    def __init__(self) -> None:
        super().__init__()
        entries = (4, *_WIDTHS[:-1])
        self.down = nn.ModuleList(_Branches(a, b, 3) for a, b in zip(entries, _WIDTHS, strict=True))
        self.deep = nn.ModuleList(
            nn.Sequential(*(_Branches(width * len(kernels) if k else width, width, *kernels) for k in range(depth)))
            for width, kernels, depth in zip(_WIDTHS, _KERNELS, _DEPTH, strict=True)
        )
        self.up = nn.ModuleList(
            nn.Conv2d(_WIDTHS[k + 1] * len(_KERNELS[k + 1]), _WIDTHS[k], 3, padding=1, padding_mode="reflect")
            for k in range(4)
        )
        self.merge = nn.ModuleList(_Branches(2 * width, width, 3) for width in _WIDTHS[:-1])
        self.last = nn.Conv2d(_WIDTHS[0] * len(_KERNELS[0]), 3, 3, padding=1, padding_mode="reflect")

    def forward(self, raw: Tensor) -> Tensor:
        """RGB."""
        scales = []
        x = raw
        for place, block in enumerate(self.down):
            x = block(x if place == 0 else F.max_pool2d(x, 2))
            scales.append(x)
        x = self.deep[4](x)
        for place in (3, 2, 1, 0):
            risen = self.up[place](F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
            x = self.deep[place](self.merge[place](torch.cat([risen, scales[place]], dim=1)))
        rgb: Tensor = self.last(x).sigmoid()
        return rgb


@final
class _Branches(nn.Module):
    """Two convolutions for each kernel size, side by side; their outputs are concatenated."""

    def __init__(self, inside: int, outside: int, *kernels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*_layers(inside, outside, k)) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, len(kernels) * outside, H, W)`."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _layers(inside: int, outside: int, kernel: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for entry in (inside, outside):
        layers += [
            nn.ReflectionPad2d(kernel // 2),
            nn.Conv2d(entry, outside, kernel),
            nn.InstanceNorm2d(outside, affine=True),
            nn.LeakyReLU(0.2),
        ]
    return layers
