"""crop_ensemble: lets the encoder look at several random crops (Guo et al. 2018)."""

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.plugin import DefenseSpec, param
from robustbench_x_defenses.preprocess.pixels import keep_broken, pick

__all__ = ["SPEC", "CropEnsemble"]


@final
@dataclass(frozen=True, kw_only=True)
class CropEnsemble:
    """Cuts random crops from each image and enlarges them to its size, as several looks at one image.

    Images `(N, 3, H, W)` become `(N, crops, 3, H, W)`: the features of the looks are averaged before the head. Each
    crop has the share `area` of the image, its aspect ratio, and a place drawn uniformly, anew at every call; it is
    resized back bilinearly. The gradient is exact.

    Departures:
        Guo et al. take 30 crops of 90 of 299 pixels (`crops=30`, `area=0.09`) and average the predictions, with a
        network trained on such crops. Features are averaged here, which is the same thing for a linear head up to the
        softmax. Encoders here saw whole images, so the default keeps most of the image and is cheaper.
    """

    crops: int = param(10, "crops per image; the cost of a pass through the encoder grows with it")
    area: float = param(0.9, "share of the image that a crop keeps, below 1")

    def __post_init__(self) -> None:
        if not 1 <= self.crops <= 100:
            raise ValueError(f"crops={self.crops} must lie between 1 and 100")
        if not 0 < self.area < 1:
            raise ValueError(f"area={self.area} must lie between 0 and 1, both excluded")

    def apply(self, images: Tensor) -> Tensor:
        """Looks `(N, crops, 3, H, W)`."""
        count, channels, height, width = images.shape
        tops, lefts = torch.rand(2, count * self.crops, 1, device=images.device)
        repeated = images.repeat_interleave(self.crops, dim=0)
        cut = pick(repeated, self._span(height, tops), self._span(width, lefts))
        looks = F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)
        return keep_broken(looks.view(count, self.crops, channels, height, width), images)

    def _span(self, length: int, place: Tensor) -> Tensor:
        """Indices `(M, side)` that each crop keeps of a line; `place` holds uniform numbers in [0, 1), `(M, 1)`."""
        side = max(1, math.floor(length * math.sqrt(self.area)))
        return (place * (length - side + 1)).long() + torch.arange(side, device=place.device)


SPEC = DefenseSpec(
    name="crop_ensemble",
    summary="features averaged over random crops",
    factory=CropEnsemble,
    source="Guo et al. 2018 (ICLR), arXiv 1711.00117",
    stochastic=True,
)
