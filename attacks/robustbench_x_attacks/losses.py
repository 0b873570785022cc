"""Losses an iterative attack can ascend: one value per sample, larger is worse for the victim.

Classification losses take logits `(N, K)` and class indices `(N,)`; feature losses take features or tokens
of the adversarial and the clean images.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.views import EncoderHandle

__all__ = [
    "LabelLoss",
    "TargetLoss",
    "cross_entropy",
    "cross_entropy_targeted",
    "dlr",
    "dlr_targeted",
    "feature_cosine",
    "feature_l2",
    "feature_maps",
    "lead",
    "margin",
]

LabelLoss = Callable[[Tensor, Tensor], Tensor]
TargetLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label), `(N,)`."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's, `(N,)`: positive exactly where the prediction is wrong."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return others - own


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6), `(N,)`: `margin` over the gap of first to third logit.

    Raises:
        AttackError: Fewer than three classes.
    """
    _need_classes(logits, 3, "the DLR loss")
    ordered = logits.topk(3, dim=1).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2]).clamp(min=1e-12)


def cross_entropy_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """log p(target), `(N,)`."""
    return -F.cross_entropy(logits, targets, reduction="none")


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, eq. 7), `(N,)`.

    Raises:
        AttackError: Fewer than four classes.
    """
    _need_classes(logits, 4, "the targeted DLR loss")
    ordered = logits.topk(4, dim=1).values
    gap = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    own = logits.gather(1, labels[:, None]).squeeze(1)
    wanted = logits.gather(1, targets[:, None]).squeeze(1)
    return (wanted - own) / gap.clamp(min=1e-12)


def lead(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the label's, `(N,)`: what `dlr_targeted` divides, for any number of classes."""
    pair = logits.gather(1, torch.stack([targets, labels], dim=1))
    return pair[:, 0] - pair[:, 1]


def feature_cosine(features: Tensor, clean: Tensor) -> Tensor:
    """1 - cosine similarity along the last axis, averaged over any token axis, `(N,)`, in [0, 2].

    Its gradient is exactly zero where both agree, so an attack must start off the clean image.
    """
    distance = 1 - F.cosine_similarity(features, clean, dim=-1)
    return distance.flatten(1).mean(dim=1) if distance.ndim > 1 else distance


def feature_l2(features: Tensor, clean: Tensor) -> Tensor:
    """Squared Euclidean distance, averaged over every axis but the first, `(N,)`."""
    return (features - clean).square().flatten(1).mean(dim=1)


def feature_maps(encoder: EncoderHandle, images: Tensor, layer: str) -> Tensor:
    """What a feature loss compares: pooled features `(N, D)` for layer `""`, else that layer's tokens `(N, P+T, D)`.

    Raises:
        AttackError: The encoder has no such layer.
    """
    if not layer:
        return encoder.features(images)
    if layer not in encoder.layers:
        raise AttackError(f"the encoder has no layer '{layer}'; it has {', '.join(encoder.layers) or 'none'}")
    tokens = encoder.tokens(images, [layer])[layer]
    return tokens.spatial if tokens.prefix is None else torch.cat([tokens.prefix, tokens.spatial], dim=1)


def _need_classes(logits: Tensor, least: int, what: str) -> None:
    if logits.shape[1] < least:
        raise AttackError(
            f"{what} needs {least} classes, the head has {logits.shape[1]}: use pgd or apgd_ce with cross-entropy"
        )
