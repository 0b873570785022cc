"""Nearest neighbours by cosine similarity, as a differentiable head.

The weighted vote of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
CVPR 2018, section 3.4, with their temperature; k = 20 is what DINO (Caron et al., ICCV 2021) reports best.
"""

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.heads._training import check_training
from robustbench_x.heads.base import HeadSpec

__all__ = ["SPEC", "KNNHead", "fit", "restore"]

_K = 20
_TEMPERATURE = 0.07
_FLOOR = 1e-4
"""Added to every share: it changes no prediction, and keeps the cross-entropy from saturating in float32."""


@final
class KNNHead(nn.Module):
    """Features `(N, D)` to log shares of the vote `(N, K)`, at least log 1e-4; neighbours are chosen anew each time."""

    bank: Tensor
    labels: Tensor
    k: Tensor
    temperature: Tensor

    def __init__(self, bank: Tensor, labels: Tensor, k: Tensor, temperature: Tensor) -> None:
        super().__init__()
        for name, value in (("bank", bank), ("labels", labels), ("k", k), ("temperature", temperature)):
            self.register_buffer(name, value)
        self._k = int(k)
        self._num_classes = int(labels.max()) + 1

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(N, K)`: log of each class's share of the votes, a neighbour's weighted by `exp(cosine / T)`.

        The value is that of the k nearest. The gradient is that of a vote of the whole bank: a class without a
        neighbour would have none of its own, and a white-box attack could not move toward it.
        """
        scores = F.normalize(features.float(), dim=1) @ self.bank.T / self.temperature
        near, index = scores.topk(self._k, dim=1)
        value = self._shares(near, self.labels[index])
        if not torch.is_grad_enabled():
            return value
        soft = self._shares(scores, self.labels.expand_as(scores))
        return soft + (value - soft).detach()

    def _shares(self, scores: Tensor, labels: Tensor) -> Tensor:
        weights = scores.softmax(dim=1)
        return (weights.new_zeros(len(scores), self._num_classes).scatter_add(1, labels, weights) + _FLOOR).log()


def fit(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> KNNHead:
    """The normalised features as a bank; k is 20, or the size of a smaller bank.

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
    device = features.device
    return KNNHead(
        F.normalize(features.float(), dim=1),
        labels.clone(),
        torch.tensor(min(_K, len(features)), device=device),
        torch.tensor(_TEMPERATURE, device=device),
    )


def restore(state: Mapping[str, Tensor]) -> KNNHead:
    """The fitted head from its state dict."""
    return KNNHead(state["bank"], state["labels"], state["k"], state["temperature"])


SPEC = HeadSpec(
    name="knn",
    summary="20 nearest neighbours by cosine, votes weighted by similarity",
    fit=fit,
    restore=restore,
    settings={"k": _K, "temperature": _TEMPERATURE},
)
