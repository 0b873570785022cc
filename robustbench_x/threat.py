"""Threat models: what an attack may change, by how much, and the projections that enforce it.

All images are float32 NCHW in [0, 1]. `eps` is in the same units: a bound on the largest pixel change
(`linf`), on the Euclidean norm of the change (`l2`), or the share of the image area that a square patch
may cover (`patch`; inside it any valid pixel is allowed).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from robustbench_x.errors import ConfigError
from robustbench_x.numbers import format_eps
from robustbench_x.randomness import SampleRandom

__all__ = ["Norm", "Placement", "ThreatModel", "patch_mask"]

Norm = Literal["linf", "l2", "patch"]
Placement = Literal["bottom-right", "bottom-left", "top-right", "top-left", "center", "random"]

_LEVELS = 255.0
_DIMS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """A norm and its budget.

    Args:
        norm: `linf`, `l2` or `patch`.
        eps: The budget, in [0, 1] pixel units (`linf`, `l2`) or as a share of the image area (`patch`).
        placement: Where a patch sits: flush with the named corner, centred, or `random`, a place of its own for every
            image, drawn from that image's pixels, so that attack and judge agree on it. Unused by other norms.

    Raises:
        ConfigError: Unknown norm or placement, negative or non-finite `eps`, or a `linf`/`patch` budget above 1.
    """

    norm: Norm = "linf"
    eps: float
    placement: Placement = "bottom-right"

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ConfigError(f"unknown norm '{self.norm}'; choose from {', '.join(get_args(Norm))}")
        if self.placement not in get_args(Placement):
            known = ", ".join(get_args(Placement))
            raise ConfigError(f"unknown patch placement '{self.placement}'; choose from {known}")
        if not math.isfinite(self.eps) or self.eps < 0:
            raise ConfigError(f"eps must be a finite number >= 0, got {self.eps}")
        if self.norm != "l2" and self.eps > 1:
            raise ConfigError(f"eps={self.eps:g} exceeds 1: pixels live in [0, 1], so write 8/255, not 8")

    def __str__(self) -> str:
        return f"{self.norm} {format_eps(self.eps)}"

    @property
    def radius(self) -> float:
        """What step sizes are measured against: `eps`, or the full range 1 inside a patch."""
        return (1.0 if self.eps else 0.0) if self.norm == "patch" else self.eps

    def side(self, height: int, width: int) -> int:
        """Side of the patch square in pixels on an image of that size: the largest whose area the budget covers."""
        return min(math.isqrt(int(self.eps * height * width + 1e-9)), height, width)

    def corners(self, inputs: Tensor) -> Tensor:
        """Row and column of the top left pixel of the patch of each image, `(N, 2)` int64."""
        height, width = inputs.shape[-2:]
        side = self.side(height, width)
        free = torch.tensor([height - side, width - side], device=inputs.device)
        if self.placement == "random":
            return _drawn_from(inputs) % (free + 1)
        if self.placement == "center":
            corner = free // 2
        else:
            vertical, horizontal = self.placement.split("-")
            corner = free * torch.tensor([vertical == "bottom", horizontal == "right"], device=inputs.device)
        return corner.expand(len(inputs), 2)

    def mask(self, inputs: Tensor) -> Tensor:
        """Pixels that may change, boolean `(N, 1, H, W)`: all of them, or the patch square."""
        height, width = inputs.shape[-2:]
        if self.norm != "patch":
            return torch.ones(len(inputs), 1, height, width, dtype=torch.bool, device=inputs.device)
        return patch_mask(self.corners(inputs), self.side(height, width), height, width)

    def project(self, candidates: Tensor, inputs: Tensor) -> Tensor:
        """The closest images to `candidates` inside the budget around `inputs` and inside [0, 1].

        For `l2` the ball is projected first and the box second: the clip only shortens a change that
        starts inside the box, so both hold, though the point need not be the nearest one of the
        intersection (Dykstra's algorithm would find that; no attack needs it).

        Args:
            candidates: `(N, C, H, W)` finite floats of any range.
            inputs: `(N, C, H, W)` clean images in [0, 1].
        """
        return _NORMS[self.norm].project(candidates, inputs, self).clamp(0.0, 1.0)

    def distance(self, candidates: Tensor, inputs: Tensor) -> Tensor:
        """How much of the budget is used, shape `(N,)`: largest change, Euclidean norm, or area share."""
        return _NORMS[self.norm].distance(candidates, inputs, self)

    def overrun(self, candidates: Tensor, inputs: Tensor) -> Tensor:
        """How far each candidate lies outside budget or range, `(N,)`: largest pixel difference to its projection."""
        return (candidates - self.project(candidates, inputs)).abs().amax(dim=_DIMS)

    def noise(self, inputs: Tensor, random: SampleRandom) -> Tensor:
        """Structureless images at the full budget: random signs, a point on the sphere, a uniform patch."""
        return self.project(_NORMS[self.norm].noise(inputs, random, self), inputs)

    def start(self, inputs: Tensor, random: SampleRandom, index: Tensor | None = None) -> Tensor:
        """Random starting points inside the budget: uniform in the cube, the ball, or the patch."""
        return self.project(_NORMS[self.norm].start(inputs, random, self, index), inputs)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The steepest direction of unit size for this norm; zero where the gradient is zero."""
        return _NORMS[self.norm].ascent(gradient)

    def quantize(self, candidates: Tensor, inputs: Tensor) -> Tensor:
        """`candidates` (inside the budget) on the 8-bit grid k/255, still inside the budget.

        A coordinate whose budget interval holds no grid value keeps the clean one; clean images that were
        themselves 8-bit, as ours are, always stay on the grid.
        """
        return _NORMS[self.norm].quantize(candidates, inputs, self)


def patch_mask(corners: Tensor, side: int, height: int, width: int) -> Tensor:
    """True inside the square of `side` pixels whose top left pixel is at `corners` `(N, 2)`; boolean `(N, 1, H, W)`."""
    top, left = corners.view(-1, 2, 1, 1).unbind(1)
    rows = torch.arange(height, device=corners.device).view(1, -1, 1)
    columns = torch.arange(width, device=corners.device).view(1, 1, -1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return inside.unsqueeze(1)


def _drawn_from(inputs: Tensor) -> Tensor:
    """Two whole numbers per image, `(N, 2)` in [0, 2**24), from its 8-bit levels by exact integer sums."""
    levels = (inputs.detach() * _LEVELS).round().long().flatten(1)
    place = torch.arange(1, levels.shape[1] + 1, device=inputs.device)
    weights = torch.stack([(place * 40503) % 65521, (place * 30011) % 65519], dim=1)
    # By rows: a matrix product of integers exists on no GPU.
    sums = torch.stack([(levels * weights[:, k]).sum(dim=1) for k in (0, 1)], dim=1)
    return ((sums * 1103515245 + 12345) % 2**31) // 2**7


def _flat_norm(change: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(change.flatten(1), dim=1)
    return norm


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _linf_project(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    return torch.minimum(torch.maximum(candidates, inputs - threat.eps), inputs + threat.eps)


def _linf_distance(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    return (candidates - inputs).abs().amax(dim=_DIMS)


def _linf_noise(inputs: Tensor, random: SampleRandom, threat: ThreatModel) -> Tensor:
    return inputs + threat.eps * random.signs(inputs.shape[1:])


def _linf_start(inputs: Tensor, random: SampleRandom, threat: ThreatModel, index: Tensor | None) -> Tensor:
    return inputs + threat.eps * (2 * random.uniform(inputs.shape[1:], index) - 1)


def _linf_quantize(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    # Half a thousandth of a level of slack: 4/255 in float32 must still admit the fourth level.
    slack = 5e-4
    low = torch.ceil((inputs - threat.eps).clamp(min=0) * _LEVELS - slack)
    high = torch.floor((inputs + threat.eps).clamp(max=1) * _LEVELS + slack)
    rounded = torch.minimum(torch.maximum(torch.round(candidates * _LEVELS), low), high)
    return torch.where(low <= high, rounded / _LEVELS, inputs)


def _l2_project(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    change = candidates - inputs
    norm = _flat_norm(change)
    scale = torch.where(norm > threat.eps, threat.eps / norm.clamp(min=1e-12), torch.ones_like(norm))
    return inputs + change * _per_sample(scale)


def _l2_distance(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    return _flat_norm(candidates - inputs)


def _l2_noise(inputs: Tensor, random: SampleRandom, threat: ThreatModel) -> Tensor:
    return inputs + threat.eps * _l2_ascent(random.normal(inputs.shape[1:]))


def _l2_start(inputs: Tensor, random: SampleRandom, threat: ThreatModel, index: Tensor | None) -> Tensor:
    direction = _l2_ascent(random.normal(inputs.shape[1:], index))
    dimension = inputs[0].numel() if len(inputs) else 1
    return inputs + threat.eps * direction * random.uniform((1, 1, 1), index) ** (1 / dimension)


def _l2_quantize(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    # Rounding lengthens a change that spends its budget. The change is scaled, by bisection, to the longest whose
    # rounding still fits; what is found stays within a thousandth of the best scale.
    change = candidates - inputs
    best = inputs
    low = torch.zeros(len(inputs), device=inputs.device)
    high = torch.ones_like(low)
    scale = high
    for _ in range(11):
        rounded = (torch.round((inputs + change * _per_sample(scale)) * _LEVELS) / _LEVELS).clamp(0, 1)
        fits = _flat_norm(rounded - inputs) <= threat.eps
        best = torch.where(_per_sample(fits), rounded, best)
        low, high = torch.where(fits, scale, low), torch.where(fits, high, scale)
        scale = (low + high) / 2
    return best


def _patch_project(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    return torch.where(threat.mask(inputs), candidates, inputs)


def _patch_distance(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    return (candidates != inputs).any(dim=1).float().mean(dim=(1, 2))


def _patch_noise(inputs: Tensor, random: SampleRandom, threat: ThreatModel) -> Tensor:
    return random.uniform(inputs.shape[1:])


def _patch_start(inputs: Tensor, random: SampleRandom, threat: ThreatModel, index: Tensor | None) -> Tensor:
    return random.uniform(inputs.shape[1:], index)


def _patch_quantize(candidates: Tensor, inputs: Tensor, threat: ThreatModel) -> Tensor:
    return torch.where(threat.mask(inputs), torch.round(candidates * _LEVELS) / _LEVELS, inputs)


def _l2_ascent(gradient: Tensor) -> Tensor:
    # Scale by the largest entry first: a gradient of 1e-25 squares to zero in float32 and would look absent.
    largest = gradient.abs().amax(dim=_DIMS, keepdim=True)
    scaled = torch.where(largest > 0, gradient / largest, torch.zeros_like(gradient))
    return scaled / _per_sample(_flat_norm(scaled)).clamp(min=1e-12)


class _NormRules(NamedTuple):
    project: Callable[[Tensor, Tensor, ThreatModel], Tensor]
    distance: Callable[[Tensor, Tensor, ThreatModel], Tensor]
    noise: Callable[[Tensor, SampleRandom, ThreatModel], Tensor]
    start: Callable[[Tensor, SampleRandom, ThreatModel, Tensor | None], Tensor]
    ascent: Callable[[Tensor], Tensor]
    quantize: Callable[[Tensor, Tensor, ThreatModel], Tensor]


_NORMS: dict[str, _NormRules] = {
    "linf": _NormRules(_linf_project, _linf_distance, _linf_noise, _linf_start, torch.sign, _linf_quantize),
    "l2": _NormRules(_l2_project, _l2_distance, _l2_noise, _l2_start, _l2_ascent, _l2_quantize),
    "patch": _NormRules(_patch_project, _patch_distance, _patch_noise, _patch_start, torch.sign, _patch_quantize),
}
