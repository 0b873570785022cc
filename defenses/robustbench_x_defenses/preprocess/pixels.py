"""What several preprocessing defences need: NaN that stays NaN, and pixels picked by row and column."""

import torch
from torch import Tensor

__all__ = ["keep_broken", "pick"]


def keep_broken(out: Tensor, images: Tensor) -> Tensor:
    """`out` `(N, ...)`, NaN throughout where an image `(N, 3, H, W)` it was made from has a pixel that is not finite.

    Filters and codecs would otherwise turn such a pixel into a colour, and a broken image into a fine one.
    """
    broken = ~images.detach().isfinite().flatten(1).all(dim=1)
    return out.masked_fill(broken.view(-1, *[1] * (out.ndim - 1)), torch.nan)


def pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels `(N, C, h, w)` of `images` `(N, C, H, W)` at `rows` `(N or 1, h)` and `columns` `(N or 1, w)`."""
    lines = torch.take_along_dim(images, rows[:, None, :, None], dim=2)
    return torch.take_along_dim(lines, columns[:, None, None, :], dim=3)
