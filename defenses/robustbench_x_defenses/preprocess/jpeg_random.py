"""jpeg_random: compresses each image at a quality of its own (Gao et al. 2022)."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.plugin import DefenseSpec, param
from robustbench_x_defenses.jpeg import JPEG

__all__ = ["SPEC", "RandomJPEG"]


@final
@dataclass(frozen=True, kw_only=True)
class RandomJPEG:
    """The round trip of `jpeg`, with the quality drawn per image and call, uniformly from low, ..., high - 1.

    Gao et al. (NeurIPS 2022) study it among the random preprocessings; 55 to 75 with the end excluded is their range.
    The stand-in is kornia's differentiable codec at the middle of the range and draws nothing, so that the attacker's
    forward pass is a draw of the deployed defence and nothing else.

    Departures:
        The stand-in is ours; the usual attack passes gradients straight through, which is what `bpda` knows.
    """

    low: int = param(55, "lowest quality, 1 to 95")
    high: int = param(75, "end of the range, itself excluded; at most 96")

    def __post_init__(self) -> None:
        if not 1 <= self.low < self.high - 1 <= 95:
            raise ValueError(
                f"low={self.low} and high={self.high} must leave two qualities or more between 1 and 95 (high excluded)"
            )

    def apply(self, images: Tensor) -> Tensor:
        """Decoded images; NaN pixels stay NaN."""
        qualities: list[int] = torch.randint(self.low, self.high, (len(images),), device=images.device).tolist()
        decoded = [JPEG(quality=q).apply(images[i : i + 1]) for i, q in enumerate(qualities)]
        return torch.cat(decoded)

    def stand_in(self, images: Tensor) -> Tensor:
        """kornia's codec at the middle quality."""
        return JPEG(quality=(self.low + self.high - 1) // 2).stand_in(images)


SPEC = DefenseSpec(
    name="jpeg_random",
    summary="JPEG round trip at a quality drawn per image; full knowledge uses kornia's codec at the middle one",
    factory=RandomJPEG,
    source="Gao et al. 2022 (NeurIPS), arXiv 2206.09491",
    gradient="stand-in",
    stochastic=True,
)
