"""feature_squeezing: refuses what an encoder sees otherwise once the image is squeezed (Xu et al., NDSS 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.plugin import Defense, DefenseSpec, Trainer, param
from robustbench_x.views import DefenseFitView, EncoderHandle
from robustbench_x_defenses.preprocess.bit_depth import BitDepth
from robustbench_x_defenses.preprocess.median import Median

__all__ = ["SPEC", "FeatureSqueezing"]


@final
@dataclass(frozen=True, kw_only=True)
class FeatureSqueezing:
    """Feature squeezing on embeddings: the largest cosine distance between an image's features and a squeezed copy's.

    The squeezers are a reduced bit depth and a median filter. The bit depth has no gradient, so an attacker who knows
    the detector gets the straight-through one; the score itself is the deployed one.

    Departures from Xu, Evans & Qi (NDSS 2018, arXiv 1704.01155): they compare softmax outputs by L1 and need the head;
    features serve every head. Their third squeezer for ImageNet, non-local means, is left out. The threshold is set by
    the harness, from held-out clean images, as theirs is by 5 % of false positives.
    """

    artifact: str = param("", "file of rbx fit feature_squeezing; empty: thresholds from clean training images, cached")
    bits: int = param(5, "bit depth of the first squeezer; published for ImageNet: 5")
    kernel: int = param(2, "side of the median filter's window; published for ImageNet: 2")

    def __post_init__(self) -> None:
        BitDepth(bits=self.bits)
        Median(kernel=self.kernel)

    def trainer(self, view: DefenseFitView) -> Trainer:
        """A training of no steps: there is nothing to learn but the threshold, which the harness sets."""
        return _Nothing(self)

    def armed(self, learned: Mapping[str, Tensor]) -> Defense:
        """The detector."""
        try:
            bits, kernel = (int(value) for value in learned["settings"])
        except KeyError:
            raise ValueError("these are no settings of feature_squeezing") from None
        return _Armed(BitDepth(bits=bits), Median(kernel=kernel))


@final
@dataclass(frozen=True)
class _Armed:
    """What is deployed: images pass unchanged, if they pass."""

    depth: BitDepth
    median: Median

    def apply(self, images: Tensor) -> Tensor:
        """The images."""
        return images

    def score(self, images: Tensor, encoder: EncoderHandle) -> Tensor:
        """Largest cosine distance to a squeezed copy's features, `(N,)` in [0, 2]."""
        plain = encoder.features(images)
        # The value of the reduced image to the last bit, with the gradient of the image itself.
        reduced = self.depth.apply(images.detach()) + (images - images.detach())
        squeezed = [encoder.features(reduced), encoder.features(self.median.apply(images))]
        return torch.stack([1 - F.cosine_similarity(plain, other, dim=1) for other in squeezed]).amax(dim=0)


@final
class _Nothing:
    """Keeps the settings, so that an artefact cannot be used with others."""

    steps, batch = 0, 0

    def __init__(self, detector: FeatureSqueezing) -> None:
        self._settings = torch.tensor([detector.bits, detector.kernel])

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """There is none."""
        raise AssertionError("a training of no steps took one")

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return self.result()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return {"settings": self._settings}


SPEC = DefenseSpec(
    name="feature_squeezing",
    summary="detector: how far features move when the image's bits and details are reduced",
    factory=FeatureSqueezing,
    source="Xu, Evans & Qi 2018 (NDSS), arXiv 1704.01155",
    knowledge=("oblivious", "full"),
    fits=True,
    per_encoder=True,
    fitted_by=("bits", "kernel"),
    detects=True,
)
