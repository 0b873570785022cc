"""Cosine similarity to class means: the simplest head that a few images can fit.

Of normalised features, as in Wang et al., "SimpleShot", 2019: an image with a long feature vector then counts
no more than another.
"""

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.heads._training import check_training
from robustbench_x.heads.base import HeadSpec

__all__ = ["SPEC", "PrototypeHead", "fit", "restore"]

_TEMPERATURE = 0.07


@final
class PrototypeHead(nn.Module):
    """Features `(N, D)` to cosine similarities with the prototypes, over the temperature, `(N, K)`."""

    prototypes: Tensor
    temperature: Tensor

    def __init__(self, prototypes: Tensor, temperature: Tensor) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("temperature", temperature)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(N, K)`."""
        return F.normalize(features.float(), dim=1) @ self.prototypes.T / self.temperature


def fit(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> PrototypeHead:
    """One prototype per class: the mean of its normalised features, normalised again.

    Args:
        features: `(N, D)`.
        labels: `(N,)` int64 in `[0, num_classes)`.
        num_classes: K.
        seed: Unused: nothing is drawn.

    Raises:
        DataError: A feature is not finite, or a class has no sample.
    """
    del seed
    check_training(features, labels, num_classes)
    sums = features.new_zeros(num_classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, F.normalize(features.double(), dim=1))
    prototypes = F.normalize(sums, dim=1).float()
    return PrototypeHead(prototypes, torch.tensor(_TEMPERATURE, device=features.device))


def restore(state: Mapping[str, Tensor]) -> PrototypeHead:
    """The fitted head from its state dict."""
    return PrototypeHead(state["prototypes"], state["temperature"])


SPEC = HeadSpec(
    name="prototype",
    summary="cosine similarity to the class means",
    fit=fit,
    restore=restore,
    settings={"temperature": _TEMPERATURE},
)
