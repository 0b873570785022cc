"""Retrieval: the training split is the gallery, an attacked image the query, cosine similarity the ranking.

An item is relevant when it is of the query's class. Average precision is taken over the first k = 10 items, the
top 10 that Zhou et al. (AdvEncoder, ICCV 2023) report, and divided by the most relevant items that these could
hold, min(k, relevant in the gallery); the paper does not say its divisor, so that one is our choice.
"""

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.heads._training import check_training
from robustbench_x.heads.base import HeadSpec, Ranking

__all__ = ["SPEC", "RetrievalHead", "average_precision", "fit", "restore"]

_K = 10
_TEMPERATURE = 0.07


@final
class RetrievalHead(nn.Module):
    """Features `(N, D)` to the best cosine of each class over the temperature, `(N, K)`.

    Its prediction is the class of the item ranked first (of equally near items of several classes the lowest class), so
    the classification metrics are those of rank 1, and a white-box attack has a gradient toward every class.
    """

    gallery: Tensor
    labels: Tensor
    temperature: Tensor

    def __init__(self, gallery: Tensor, labels: Tensor, temperature: Tensor) -> None:
        super().__init__()
        for name, value in (("gallery", gallery), ("labels", labels), ("temperature", temperature)):
            self.register_buffer(name, value)
        self._num_classes = int(labels.max()) + 1

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(N, K)`."""
        scores = self._cosines(features)
        best = scores.new_full((len(scores), self._num_classes), -torch.inf)
        index = self.labels.expand_as(scores)
        return best.scatter_reduce(1, index, scores, reduce="amax") / self.temperature

    @torch.no_grad()
    def rank(self, features: Tensor, labels: Tensor) -> Ranking:
        """How well the gallery is ranked for queries of `labels` `(N,)`."""
        order = self._cosines(features).argsort(dim=1, descending=True, stable=True)
        relevant = self.labels[order] == labels[:, None]
        first = (relevant.float().argmax(dim=1) + 1).float().masked_fill(~relevant.any(dim=1), torch.inf)
        return Ranking(precision=average_precision(relevant, _K), first=first)

    def _cosines(self, features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=1) @ self.gallery.T


def average_precision(relevant: Tensor, k: int) -> Tensor:
    """AP@k of each row, `(N,)` in [0, 1]: precision at each relevant item of the first k, summed over min(k, relevant).

    Args:
        relevant: `(N, M)` boolean, best-ranked first.
        k: Items looked at.
    """
    top = relevant[:, :k].double()
    precision = top.cumsum(dim=1) / torch.arange(1, top.shape[1] + 1, device=top.device)
    possible = relevant.sum(dim=1).clamp(max=k)
    return (precision * top).sum(dim=1) / possible.clamp(min=1)


def fit(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> RetrievalHead:
    """The normalised features as a gallery.

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
    temperature = torch.tensor(_TEMPERATURE, device=features.device)
    return RetrievalHead(F.normalize(features.float(), dim=1), labels.clone(), temperature)


def restore(state: Mapping[str, Tensor]) -> RetrievalHead:
    """The fitted head from its state dict."""
    return RetrievalHead(state["gallery"], state["labels"], state["temperature"])


SPEC = HeadSpec(
    name="retrieval",
    summary="cosine ranking of the training split as a gallery: map@10, recall@1, recall@10",
    fit=fit,
    restore=restore,
    settings={"k": _K, "temperature": _TEMPERATURE},
    task="retrieval",
)
