"""What AnyAttack's decoder learns from, as pure functions: contrastive and cosine losses, temperature, learning rate.

Every loss takes embeddings `(N, D)`, normalises them itself and returns a 0-d tensor that falls as the attack improves.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["alignment", "bidirectional", "info_nce", "learning_rate_at", "temperature_at"]


def info_nce(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding key i by query i among all keys: `L_Pre` with targets as queries, adversarials as keys.

    Args:
        query: `(N, D)`, any length.
        keys: `(N, D)`; row i belongs to query i, all others are its negatives.
        temperature: Divides the cosines.
    """
    cosines = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(query), device=query.device))


def bidirectional(adversarial: Tensor, targets: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean of `info_nce` in both directions (BiCL, `L_Bi`)."""
    return (info_nce(adversarial, targets, temperature) + info_nce(targets, adversarial, temperature)) / 2


def alignment(adversarial: Tensor, targets: Tensor) -> Tensor:
    """Minus the mean cosine of each pair (`L_Cos`)."""
    return -F.cosine_similarity(adversarial, targets, dim=1).mean()


def temperature_at(
    step: int, *, start: float = 1.0, end: float = 0.07, steps: int = 10_000, epoch: int | None = None
) -> float:
    """The temperature of one step: from `start` geometrically to `end` over `steps`, then held.

    Args:
        step: From 0, over the whole training.
        start: Of the first step.
        end: Of step `steps` and all later ones.
        steps: How long it falls.
        epoch: Steps per epoch, for what the released code does: it sets the temperature after each step from the number
            of the batch in its epoch, so that the value lags by one step and jumps back to `start` in every epoch.

    >>> [round(temperature_at(step), 3) for step in (0, 2_500, 5_000, 10_000, 520_000)]
    [1.0, 0.514, 0.265, 0.07, 0.07]
    """
    if epoch is not None:
        step = (step - 1) % epoch if step else 0
    return float(start * (end / start) ** (min(step, steps) / steps))


def learning_rate_at(step: int, *, rate: float, restart: int) -> float:
    """The learning rate of one step: from `rate` along a cosine towards zero, and back up every `restart` steps."""
    return rate * (1 + math.cos(math.pi * (step % restart) / restart)) / 2
