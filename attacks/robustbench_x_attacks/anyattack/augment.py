"""The draws of AnyAttack's training: views of the images, and who gets whose noise."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["deranged", "others", "random_views"]

_LEAST_AREA = 0.08
_WIDEST = 4 / 3


def random_views(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 0.0,
    rows: Tensor | None = None,
    batch: int | None = None,
) -> Tensor:
    """Every image cropped at random, resized back, mirrored every other time, and turned.

    The crop has 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3, as in torchvision's `RandomResizedCrop`, but
    is cut to the image where it would not fit, instead of drawn again. The turn goes by up to `degrees` either way, in
    one resampling with the crop, so that its corners show what lies beside the crop, and black only off the image.

    Args:
        images: `(N, 3, H, W)` in [0, 1].
        generator: On the CPU.
        degrees: Largest turn.
        rows: Places of the images in a batch whose other images are elsewhere; None: they are the batch.
        batch: How many images the batch has; the draws are as if all of them were here.
    """
    draws = torch.rand(6, batch or len(images), generator=generator)
    draws = (draws if rows is None else draws[:, rows]).to(images.device)
    area = _LEAST_AREA + (1 - _LEAST_AREA) * draws[0]
    ratio = torch.exp((2 * draws[1] - 1) * math.log(_WIDEST))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    angle = (2 * draws[2] - 1) * math.radians(degrees)
    mirror = torch.where(draws[3] < 0.5, -1.0, 1.0)
    # Rows of the map from output to input places, both in [-1, 1]: mirror, then turn, then crop. A turn is one in
    # pixels, so it is squeezed by the aspect of the image.
    aspect = images.shape[-1] / images.shape[-2]
    cosine, sine = angle.cos(), angle.sin()
    across = torch.stack([width * mirror * cosine, -width * sine / aspect, (1 - width) * (2 * draws[4] - 1)], dim=1)
    down = torch.stack([height * mirror * sine * aspect, height * cosine, (1 - height) * (2 * draws[5] - 1)], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0, 1)


def deranged(count: int, generator: torch.Generator) -> Tensor:
    """A permutation of `count` >= 2 without fixed points, uniform among them: about e tries."""
    assert count > 1, "one image has only itself"
    places = torch.arange(count)
    while True:
        order = torch.randperm(count, generator=generator)
        if not (order == places).any():
            return order


def others(index: Tensor, pool: int, generator: torch.Generator, *, distinct: bool) -> Tensor:
    """For every entry of `index` a uniform draw from `pool` images; `distinct` leaves out the entry itself."""
    if not distinct:
        return torch.randint(pool, index.shape, generator=generator)
    assert pool > 1, "one image has only itself"
    return (index.cpu() + 1 + torch.randint(pool - 1, index.shape, generator=generator)) % pool
