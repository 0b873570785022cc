"""A multivariate Gaussian of features with a shrunk covariance, in the basis of its principal components."""

import torch
from torch import Tensor

__all__ = ["Gaussian", "ledoit_wolf"]

_KEPT = ("all", "leading", "trailing")


def ledoit_wolf(features: Tensor) -> tuple[Tensor, float]:
    """Covariance `(D, D)` of `features` `(N, D)`, shrunk towards a multiple of the identity, and the shrinkage.

    The shrinkage in [0, 1] minimises the expected squared error (Ledoit & Wolf 2004). With fewer images than features,
    the usual case here, the empirical covariance has no inverse and this one has.
    """
    count, width = features.shape
    centred = (features - features.mean(dim=0)).double()
    empirical = centred.T @ centred / count
    scale = empirical.diagonal().mean()
    squares = centred.square()
    # Sums over pairs of features of the variance of their product, and of the empirical covariance's squares.
    noise = ((squares.T @ squares).sum() / count - empirical.square().sum()) / count
    distance = empirical.square().sum() - width * scale**2
    shrinkage = float((noise / distance).clamp(0, 1)) if float(distance) > 0 else 1.0
    identity = torch.eye(width, dtype=torch.float64, device=features.device)
    return (1 - shrinkage) * empirical + shrinkage * scale * identity, shrinkage


class Gaussian:
    """Squared Mahalanobis distance to clean features, over all or part of the principal components.

    Args:
        mean: `(D,)`.
        whitening: `(K, D)`: rows are principal directions over their standard deviations.
    """

    def __init__(self, mean: Tensor, whitening: Tensor) -> None:
        self.mean = mean
        self.whitening = whitening

    @classmethod
    def fit(cls, features: Tensor, *, keep: str, variance: float) -> "Gaussian":
        """The Gaussian of clean `features` `(N, D)`.

        `keep` is `all` components, the `leading` ones that make up a share `variance` of it, or the `trailing` ones
        that make up the rest, which Rippel et al. (2020) found to tell most.

        Raises:
            ValueError: Another `keep`, or fewer than two images.
        """
        if keep not in _KEPT:
            raise ValueError(f"components={keep}: choose from {', '.join(_KEPT)}")
        if len(features) < 2:
            raise ValueError(f"a covariance needs two images, there is {len(features)}")
        covariance, _ = ledoit_wolf(features)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=float(values[-1]) * 1e-10 + 1e-30), vectors.flip(1)
        leading = int((values.cumsum(0) / values.sum() < variance).sum()) + 1
        if keep == "leading":
            chosen = slice(0, leading)
        elif keep == "trailing":
            chosen = slice(min(leading, len(values) - 1), None)
        else:
            chosen = slice(0, None)
        whitening = (vectors[:, chosen] / values[chosen].sqrt()).T
        return cls(features.mean(dim=0).float(), whitening.float().contiguous())

    def distance(self, features: Tensor) -> Tensor:
        """Squared distance of `features` `(N, D)`, over the number of components.

        About 1 on average for clean ones, and less where the covariance was shrunk much.
        """
        return ((features - self.mean) @ self.whitening.T).square().mean(dim=1)
