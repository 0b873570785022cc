"""The terms of AdvEncoder's loss, each as the paper has it and as the released code has it; all are minimised."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Measure", "contrast_code", "contrast_paper", "cosine", "distance", "high_pass"]

Measure = Literal["norm", "mse"]


def contrast_paper(adversarial: Tensor, clean: Tensor, temperature: float) -> Tensor:
    """The paper's adversarial term, 0-d: the pair counts as a negative one, other clean images as positive ones.

    log(exp(cos(a_i, c_i) / t) / sum over j != i of exp(cos(a_i, c_j) / t)), averaged over i. A batch needs two images.

    Args:
        adversarial: Features `(N, D)` of the adversarial images.
        clean: Features `(N, D)` of the clean images, in the same order.
        temperature: t; the paper does not state it, the released code has 0.1.
    """
    scores = F.normalize(adversarial, dim=1) @ F.normalize(clean, dim=1).T / temperature
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return (scores.diagonal() - scores.masked_fill(own, -torch.inf).logsumexp(dim=1)).mean()


def contrast_code(adversarial: Tensor, clean: Tensor, temperature: float) -> Tensor:
    """The released code's adversarial term, 0-d: minus InfoNCE of clean queries among adversarial keys.

    The denominator includes the pair itself, so the term is the negative cross-entropy over N logits.
    """
    scores = F.normalize(clean, dim=1) @ F.normalize(adversarial, dim=1).T / temperature
    return -F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def cosine(adversarial: Tensor, clean: Tensor) -> Tensor:
    """Mean cosine similarity of the pairs, 0-d."""
    similarity: Tensor = F.cosine_similarity(adversarial, clean, dim=-1).mean()
    return similarity


def distance(images: Tensor, others: Tensor, measure: Measure) -> Tensor:
    """How far two batches lie apart, 0-d: mean Euclidean norm of the differences, or mean squared difference."""
    if measure == "mse":
        return F.mse_loss(images, others)
    norms: Tensor = torch.linalg.vector_norm((images - others).flatten(1), dim=1)
    return norms.mean()


def high_pass(images: Tensor, radius: float) -> Tensor:
    """`images` `(N, C, H, W)` without their low frequencies, as real numbers of any sign.

    Per channel: the bins of the centred spectrum whose distance from its middle is below `radius` are dropped, a hard
    disc. The published radius is 8 at 64 x 64, which drops 193 of 4096 bins.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - height // 2
    columns = torch.arange(width, device=images.device) - width // 2
    disc = rows[:, None].square() + columns[None, :].square() < radius**2
    keep = torch.fft.ifftshift(~disc)
    spectrum: Tensor = torch.fft.fft2(images) * keep
    passed: Tensor = torch.fft.ifft2(spectrum).real
    return passed
