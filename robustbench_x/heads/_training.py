"""What fitting a head needs whatever its kind: checks on the training features, their scale, a held-out share."""

import torch
from torch import Tensor

from robustbench_x.errors import DataError

__all__ = ["check_training", "hold_out", "standardisation"]

_CONSTANT = 1e-6


def check_training(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuses training data that would give a head that looks fitted and is not.

    Args:
        features: `(N, D)`.
        labels: `(N,)` int64 in `[0, num_classes)`.
        num_classes: K.

    Raises:
        DataError: A feature is not finite, a class has no sample, or labels do not belong to the features.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise DataError(
            f"expected features (N, D) and labels (N,), got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise DataError(f"{broken} of {len(features)} training images have NaN or infinite features")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise DataError(f"labels must lie in [0, {num_classes}), got [{int(labels.min())}, {int(labels.max())}]")
    empty = torch.bincount(labels, minlength=num_classes).eq(0).nonzero().flatten().tolist()
    if empty:
        more = f" (and {len(empty) - 1} more classes)" if len(empty) > 1 else ""
        raise DataError(f"class index {empty[0]} has no training sample{more}")


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """`(mean, scale)`, each `(D,)` float64: `(features - mean) / scale` has unit variance in every dimension.

    A dimension that is constant up to float32 rounding keeps scale 1; dividing by its noise would hand an
    attacker a direction in which nothing but rounding matters.
    """
    features = features.double()
    mean = features.mean(dim=0)
    scale = features.std(dim=0, correction=0)
    floor = _CONSTANT * torch.maximum(mean.abs(), scale.max())
    return mean, torch.where(scale <= floor, torch.ones_like(scale), scale)


def hold_out(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices to train on, and a stratified held-out `share`: at least one sample of every class that has two.

    A class with a single sample is trained on only; when every class is like that, the training samples are the
    held-out ones too.

    Args:
        labels: `(N,)` int64 on the CPU.
        share: Of every class, in (0, 1).
        generator: Decides who is held out; on the CPU.
    """
    train, held_out = [], []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held_out.append(members[:count])
        train.append(members[count:])
    chosen = torch.cat(held_out)
    return torch.cat(train), chosen if len(chosen) else torch.cat(train)
