"""Random crops and random spectra, written as matrix products: differentiable, and the same bit for bit every time."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.randomness import SampleRandom

__all__ = ["cosine_basis", "crop_boxes", "crop_resized", "spectral"]

_TRIES = 10
_WIDEST = 4 / 3


def crop_boxes(
    random: SampleRandom, size: tuple[int, int], area: tuple[float, float], index: Tensor | None = None
) -> Tensor:
    """A random box per sample, `(N, 4)` int64: top, left, height, width.

    By the rule of torchvision's `RandomResizedCrop`: a share of the area and an aspect ratio of 3:4 to 4:3
    (log-uniform) are drawn up to ten times until the box fits; else the whole image, or its middle where that is no
    such ratio.

    Args:
        random: One stream per sample.
        size: (height, width) of the images.
        area: Smallest and largest share of the area.
        index: The samples that draw.
    """
    height, width = size
    draws = random.uniform((_TRIES + 1, 2), index).double()
    share = area[0] + (area[1] - area[0]) * draws[:, :_TRIES, 0]
    ratio = torch.exp((2 * draws[:, :_TRIES, 1] - 1) * math.log(_WIDEST))
    heights = (height * width * share / ratio).sqrt().round().long()
    widths = (height * width * share * ratio).sqrt().round().long()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits.long().argmax(dim=1, keepdim=True)
    middle = min(height, round(width * _WIDEST)), min(width, round(height * _WIDEST))
    found = fits.any(dim=1)
    high = torch.where(found, heights.gather(1, first).squeeze(1), middle[0])
    wide = torch.where(found, widths.gather(1, first).squeeze(1), middle[1])
    places = torch.where(found[:, None], draws[:, _TRIES], 0.5)
    top, left = (places[:, 0] * (height - high + 1)).long(), (places[:, 1] * (width - wide + 1)).long()
    return torch.stack([top, left, high, wide], dim=1)


def crop_resized(images: Tensor, boxes: Tensor) -> Tensor:
    """Each image's box, resized (bilinear, half-pixel centres) to the size of the image."""
    rows, columns = images.shape[-2:]
    down = _weights(boxes[:, 0], boxes[:, 2], rows, images.dtype)
    across = _weights(boxes[:, 1], boxes[:, 3], columns, images.dtype)
    cropped: Tensor = down[:, None] @ images @ across[:, None].transpose(2, 3)
    return cropped.clamp(0, 1)


def _weights(start: Tensor, length: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Interpolation along one axis, `(N, size, size)`: what each output place takes of each input place."""
    places = torch.arange(size, device=start.device)
    wanted = (places.double() + 0.5) * (length.double() / size)[:, None] - 0.5
    wanted = torch.minimum(wanted.clamp(min=0), (length - 1).double()[:, None])
    low = wanted.floor()
    share = (wanted - low).to(dtype)[..., None]
    high = torch.minimum(low + 1, (length - 1).double()[:, None])
    begin = start[:, None]
    return F.one_hot(begin + low.long(), size) * (1 - share) + F.one_hot(begin + high.long(), size) * share


def spectral(images: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """`images + noise` with every cosine coefficient multiplied by `mask`, back as pixels, clamped to [0, 1].

    Args:
        images: `(N, 3, H, W)` in [0, 1].
        noise: Of the same shape, in the same units.
        mask: Of the same shape, around 1.
    """
    down, across = (cosine_basis(side).to(images) for side in images.shape[-2:])
    spectrum = down @ (images + noise) @ across.T
    return (down.T @ (spectrum * mask) @ across).clamp(0, 1)


@functools.lru_cache(maxsize=8)
def cosine_basis(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix `(size, size)`, frequency by place, float64."""
    place = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * place[:, None] * (place + 0.5)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis
