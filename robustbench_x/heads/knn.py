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
_TINY = 1e-20  # far below the smallest weight there is, exp(-2 / 0.07) = 4e-13


@final
class KNNHead(nn.Module):
    """Features `(N, D)` to log votes `(N, K)`; a class without a neighbour gets about -46 below the best.

    The k nearest are chosen anew at every call; gradients flow through their similarities, not the choice.
    """

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
        """Logits `(N, K)`: log of the votes, each neighbour's weighted by `exp(cosine / temperature)`."""
        similarity, index = (F.normalize(features.float(), dim=1) @ self.bank.T).topk(self._k, dim=1)
        scores = similarity / self.temperature
        # Relative to the nearest one, or the sum would depend on how close the whole bank is.
        nearest = scores[:, :1].detach()
        votes = scores.new_zeros(len(scores), self._num_classes)
        votes = votes.scatter_add(1, self.labels[index], (scores - nearest).exp())
        return (votes + _TINY).log() + nearest


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
