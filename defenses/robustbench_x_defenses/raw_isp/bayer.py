"""Bayer mosaics: one plane of alternating colour sites, and the same sites packed as four half-size planes."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ORDER", "SITES", "mosaic", "pack", "unpack"]

ORDER = ("B", "Gb", "R", "Gr")
"""Channels of packed RAW, as in the released F of Zhang et al. (2022)."""
SITES = {"R": (0, 0), "Gb": (0, 1), "Gr": (1, 0), "B": (1, 1)}
"""(row, column) of each colour in the 2 x 2 cell: RGGB by position. The released loader calls (0, 1) Gb."""
_RGB = {"R": 0, "Gb": 1, "Gr": 1, "B": 2}


def pack(plane: Tensor) -> Tensor:
    """A mosaic `(N, 1, 2H, 2W)` as `(N, 4, H, W)` in `ORDER`.

    Raises:
        ValueError: It is no single plane of even height and width.
    """
    if plane.ndim != 4 or plane.shape[1] != 1 or plane.shape[2] % 2 or plane.shape[3] % 2:
        raise ValueError(f"a mosaic is (N, 1, 2H, 2W), not {tuple(plane.shape)}")
    return torch.cat([plane[:, :, SITES[name][0] :: 2, SITES[name][1] :: 2] for name in ORDER], dim=1)


def unpack(packed: Tensor) -> Tensor:
    """Packed RAW `(N, 4, H, W)` in `ORDER` as a mosaic `(N, 1, 2H, 2W)`; the inverse of `pack`.

    Raises:
        ValueError: It has not four channels.
    """
    if packed.ndim != 4 or packed.shape[1] != len(ORDER):
        raise ValueError(f"packed RAW is (N, 4, H, W), not {tuple(packed.shape)}")
    by_site = sorted(ORDER, key=lambda name: SITES[name])
    # pixel_shuffle lays four channels out row by row over the 2 x 2 cell.
    return F.pixel_shuffle(packed[:, [ORDER.index(name) for name in by_site]], 2)


def mosaic(rgb: Tensor) -> Tensor:
    """What a sensor keeps of linear camera RGB `(N, 3, 2H, 2W)`: one colour a site, `(N, 1, 2H, 2W)`."""
    sites = [rgb[:, _RGB[name], SITES[name][0] :: 2, SITES[name][1] :: 2] for name in ORDER]
    return unpack(torch.stack(sites, dim=1))
