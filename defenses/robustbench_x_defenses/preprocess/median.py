"""median: replaces each pixel by the median of its neighbourhood (Xu et al. 2018)."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.plugin import DefenseSpec, param
from robustbench_x_defenses.preprocess.pixels import keep_broken, pick

__all__ = ["SPEC", "Median"]


@final
@dataclass(frozen=True, kw_only=True)
class Median:
    """A median filter per channel, with borders mirrored so that the edge pixel is repeated.

    It gives what `scipy.ndimage.median_filter(mode="reflect")` does, which Xu et al. use: a window with an even side
    reaches one pixel further up and left, and of an even number of values the upper middle one is taken. (A median
    filter with zero-padded borders would darken them.) The gradient is exact: that of the pixel which was selected;
    a pixel that no window selected has none.

    Departures:
        The default of 3 is ours; Xu et al. use 2 on ImageNet.
    """

    kernel: int = param(3, "side of the square window, 2 to 15")

    def __post_init__(self) -> None:
        if not 2 <= self.kernel <= 15:
            raise ValueError(f"kernel={self.kernel} must lie between 2 and 15")

    def apply(self, images: Tensor) -> Tensor:
        """Filtered images."""
        height, width = images.shape[-2:]
        padded = pick(images, self._mirrored(height, images.device), self._mirrored(width, images.device))
        offsets = [(i, j) for i in range(self.kernel) for j in range(self.kernel)]
        windows = torch.stack([padded[..., i : i + height, j : j + width] for i, j in offsets], dim=-1)
        return keep_broken(windows.kthvalue(len(offsets) // 2 + 1, dim=-1).values, images)

    def _mirrored(self, length: int, device: torch.device) -> Tensor:
        """Indices `(1, length + kernel - 1)` into a line that is continued by its mirror image on both sides."""
        before = self.kernel // 2
        index = torch.arange(-before, length + self.kernel - 1 - before, device=device) % (2 * length)
        return torch.minimum(index, 2 * length - 1 - index)[None]


SPEC = DefenseSpec(
    name="median",
    summary="median filter per channel",
    factory=Median,
    source="Xu et al. 2018, Feature Squeezing (NDSS), arXiv 1704.01155",
)
