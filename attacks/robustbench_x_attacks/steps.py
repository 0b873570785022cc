"""Step rules: how an iterative attack moves once it has a gradient."""

import itertools
import math

import torch
from torch import Tensor

from robustbench_x_attacks.iterative import StepRule, Walk

__all__ = ["apgd", "momentum", "steepest"]


def steepest(step_size: float) -> StepRule:
    """A step of `step_size` along the norm's steepest direction (sign for linf): PGD, Madry et al. 2018.

    Args:
        step_size: In [0, 1] pixel units (linf, patch) or Euclidean length (l2).
    """
    return lambda walk: walk.project(walk.images + step_size * walk.threat.ascent(walk.gradient))


def momentum(step_size: float, decay: float) -> StepRule:
    """MI-FGSM, Dong et al. 2018: accumulates L1-normalised gradients, then steps along their steepest direction."""

    def rule(walk: Walk) -> Tensor:
        mean = walk.gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        # Where the gradient vanishes the momentum simply decays; dividing would turn it into NaN.
        unit = torch.where(mean > 0, walk.gradient / mean, torch.zeros_like(walk.gradient))
        walk.memory["momentum"] = decay * walk.memory.get("momentum", torch.zeros_like(unit)) + unit
        return walk.project(walk.images + step_size * walk.threat.ascent(walk.memory["momentum"]))

    return rule


def apgd(steps: int, *, rho: float = 0.75, alpha: float = 0.75) -> StepRule:
    """APGD's step, Croce & Hein 2020, algorithm 1, with its own per-sample step size.

    Starts at twice the budget; at each checkpoint (section 3.1) a sample that rose in fewer than `rho` of the
    steps since the last one, or whose best loss and step size both stood still, halves its step and returns
    to its best point. `alpha` weighs the new step against the momentum of the last one.

    One restart per rule call sequence: state resets when the walk's step is 0.
    """
    checkpoints = _checkpoints(steps)

    def rule(walk: Walk) -> Tensor:
        m = walk.memory
        if walk.step == 0:
            ones = torch.ones_like(walk.loss)
            m.update(
                size=2 * walk.threat.radius * ones,
                best_loss=walk.loss.clone(),
                best_images=walk.images.clone(),
                best_gradient=walk.gradient.clone(),
                rises=0 * ones,
                last_loss=walk.loss.clone(),
                checkpoint_best=walk.loss.clone(),
                just_halved=torch.zeros_like(walk.loss, dtype=torch.bool),
            )
        else:
            m["rises"] = m["rises"] + (walk.loss > m["last_loss"])
            m["last_loss"] = walk.loss.clone()
            better = walk.loss > m["best_loss"]
            m["best_loss"] = torch.where(better, walk.loss, m["best_loss"])
            m["best_images"] = torch.where(_wide(better), walk.images, m["best_images"])
            m["best_gradient"] = torch.where(_wide(better), walk.gradient, m["best_gradient"])
        if walk.step in checkpoints:
            _checkpoint(walk, checkpoints[walk.step], rho)
        ascent = walk.threat.ascent(walk.gradient)
        ahead = walk.project(walk.images + _wide(m["size"]) * ascent)
        if walk.step == 0:
            return ahead
        return walk.project(walk.images + alpha * (ahead - walk.images) + (1 - alpha) * (walk.images - walk.previous))

    return rule


def _checkpoint(walk: Walk, period: int, rho: float) -> None:
    m = walk.memory
    rarely_rose = m["rises"] < rho * period
    stalled = ~m["just_halved"] & (m["best_loss"] <= m["checkpoint_best"])
    halve = rarely_rose | stalled
    m["size"] = torch.where(halve, m["size"] / 2, m["size"])
    m["just_halved"] = halve
    m["checkpoint_best"] = m["best_loss"].clone()
    m["rises"] = torch.zeros_like(m["rises"])
    walk.images = torch.where(_wide(halve), m["best_images"], walk.images)
    walk.gradient = torch.where(_wide(halve), m["best_gradient"], walk.gradient)


def _checkpoints(steps: int) -> dict[int, int]:
    """Iteration of each checkpoint to the number of steps since the one before (section 3.1 of the paper)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    marks = sorted({min(math.ceil(share * steps - 1e-9), steps) for share in shares})
    return {mark: mark - before for before, mark in itertools.pairwise(marks)}


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
