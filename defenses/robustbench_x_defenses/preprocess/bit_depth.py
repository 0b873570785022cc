"""bit_depth: fewer grey levels per channel (Xu et al. 2018)."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustbench_x.plugin import DefenseSpec, param
from robustbench_x_defenses.preprocess.pixels import keep_broken

__all__ = ["SPEC", "BitDepth"]


@final
@dataclass(frozen=True, kw_only=True)
class BitDepth:
    """Rounds every channel to 2^bits levels: round(x * (2^bits - 1)) / (2^bits - 1), with halves to even.

    That is the squeezer of Xu et al. (NDSS 2018), in which black and white stay what they are. Two others go by the
    same name and are not offered: the released code of Guo et al. (2018) rounds to multiples of 1 / 2^bits, with a
    default of 8 bits, and Athalye et al. (2018) attacked a version that cuts off the lower bits of the 8-bit pixel.

    Rounding has a zero gradient wherever it has one. The stand-in is the identity, the straight-through gradient with
    which Athalye et al. broke it, so `bpda` and `full` know the same.

    Departures:
        The default of 3 bits is Athalye's; Xu et al. use 5 on ImageNet.
    """

    bits: int = param(3, "bits kept per channel, 1 to 8")

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must lie between 1 and 8")

    def apply(self, images: Tensor) -> Tensor:
        """Images with 2^bits levels per channel."""
        top = 2**self.bits - 1
        return keep_broken((images.clamp(0, 1) * top).round() / top, images)

    def stand_in(self, images: Tensor) -> Tensor:
        """The images themselves."""
        return images


SPEC = DefenseSpec(
    name="bit_depth",
    summary="fewer grey levels per channel; full knowledge passes gradients straight through",
    factory=BitDepth,
    source="Xu et al. 2018, Feature Squeezing (NDSS), arXiv 1704.01155",
    gradient="stand-in",
)
