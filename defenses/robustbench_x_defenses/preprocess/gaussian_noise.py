"""gaussian_noise: corrupts the image with fresh Gaussian noise before the encoder sees it."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.plugin import DefenseSpec, param
from robustbench_x_defenses.preprocess.pixels import keep_broken

__all__ = ["SPEC", "GaussianNoise"]


@final
@dataclass(frozen=True, kw_only=True)
class GaussianNoise:
    """Adds independent Gaussian noise to every pixel, anew at every call, and clips to [0, 1].

    It is the input corruption that AdvEncoder (Zhou et al., ICCV 2023) was tried against, and one draw of what
    randomised smoothing (Cohen et al. 2019) votes over. The gradient is exact; where the clip holds a pixel at black
    or white, that pixel has none in this draw.

    Departures:
        The encoder was not trained on noise, as a smoothed classifier is, and nothing is certified: the harness judges
        fresh draws, it does not vote.
        Cohen et al. do not clip; the harness allows only pixels in [0, 1].
    """

    sigma: float = param(0.03, "standard deviation of the noise, for pixels in [0, 1]")

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma={self.sigma} must lie above 0 and be at most 1")

    def apply(self, images: Tensor) -> Tensor:
        """Noisy images."""
        return keep_broken((images + self.sigma * torch.randn_like(images)).clamp(0, 1), images)


SPEC = DefenseSpec(
    name="gaussian_noise",
    summary="fresh Gaussian noise on every pixel",
    factory=GaussianNoise,
    source="Cohen et al. 2019 (ICML), arXiv 1902.02918; as input corruption: Zhou et al. 2023, arXiv 2307.10563",
    stochastic=True,
)
