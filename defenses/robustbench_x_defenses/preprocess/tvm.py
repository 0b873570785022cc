"""tvm: drops random pixels and rebuilds the image with the least total variation (Guo et al. 2018)."""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustbench_x.plugin import DefenseSpec, param
from robustbench_x_defenses.preprocess.pixels import keep_broken

__all__ = ["SPEC", "TotalVariation"]

_TAU = 0.6  # primal step, the fastest of a sweep on photographs; the dual one is 1 / (8 * _TAU)
_RELAX = 1.8  # over-relaxation, below 2
_SEGMENT = 8  # steps between two checkpoints


class _Problem(NamedTuple):
    """The kept pixels `(N, 3, H, W)`, 0 elsewhere, and 1 where a pixel is kept."""

    kept: Tensor
    mask: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class TotalVariation:
    """Keeps a random share of the pixels and rebuilds the rest, anew at every call.

    With x the image and m the mask, 1 with probability `keep` for each pixel of each channel on its own, the result
    approaches the z with the least

        sum(m * (z - x)^2) + weight * TV(z),

    where TV sums the length of the gradient over the pixels of each channel. The solver is Chambolle and Pock's (2011),
    over-relaxed: `steps` steps from a weighted average of the kept neighbours, always as many, so that one image's
    result does not depend on the others. After the default 32 the objective is within 0.5% of the smallest one on a
    photograph.

    The gradient is exact: it runs back through the steps, which are recomputed in parts so that memory grows with the
    square root of their number. No stand-in is needed, and none could be closer. Dropped pixels have no gradient in a
    draw, so an attack gains from averaging over draws; `bpda` is how Athalye et al. broke it.

    Departures:
        Guo et al. solve the same kind of problem by split Bregman. The paper's data term is the norm itself, and its TV
        takes the lengths of whole rows and columns of differences; its code and Athalye's minimise the square, and take
        the length of each pixel's gradient, as here. `weight` is the lambda of Athalye's call (a Bregman weight of
        2 / lambda), 0.03 as in the paper.
        The network was not trained on such images.
    """

    keep: float = param(0.5, "probability that a pixel is kept")
    weight: float = param(0.03, "weight of the total variation, lambda")
    steps: int = param(32, "solver steps")

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep} must lie between 0 and 1, both excluded")
        if not 0 < self.weight <= 10:
            raise ValueError(f"weight={self.weight} must lie above 0 and be at most 10")
        if not 1 <= self.steps <= 10_000:
            raise ValueError(f"steps={self.steps} must lie between 1 and 10000")

    def apply(self, images: Tensor) -> Tensor:
        """Rebuilt images."""
        mask = (torch.rand_like(images) < self.keep).to(images.dtype)
        return keep_broken(self.rebuild(images, mask).clamp(0, 1), images)

    def rebuild(self, images: Tensor, mask: Tensor) -> Tensor:
        """The solver's result from the pixels of `images` where `mask` is 1, `(N, 3, H, W)` each."""
        problem = _Problem(images * mask, mask)
        state = (_fill(problem), torch.zeros_like(images), torch.zeros_like(images))
        for done in range(0, self.steps, _SEGMENT):
            count = min(_SEGMENT, self.steps - done)
            if torch.is_grad_enabled() and images.requires_grad:
                state = checkpoint(self._descend, problem, state, count, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self._descend(problem, state, count)
        return state[0]

    def _descend(
        self, problem: _Problem, state: tuple[Tensor, Tensor, Tensor], count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`count` steps on z and the dual fields, which are held as multiples of `weight`, so that 1 bounds them."""
        z, down, right = state
        scale = 1 / (1 + 2 * _TAU * problem.mask)
        pull = 2 * _TAU * problem.kept * scale
        rise_down, rise_right = self._rises(z)
        for _ in range(count):
            # What is rolled across an edge is 0 in the duals, and multiplied by 0 in the differences.
            inflow = (down - down.roll(1, -2)) + (right - right.roll(1, -1))
            following = torch.addcmul(pull, torch.add(z, inflow, alpha=self.weight * _TAU), scale)
            ahead = torch.lerp(z, following, 2.0)
            new_down = torch.addcmul(down, rise_down, ahead.roll(-1, -2) - ahead)
            new_right = torch.addcmul(right, rise_right, ahead.roll(-1, -1) - ahead)
            shrink = torch.addcmul(new_down * new_down, new_right, new_right).clamp(min=1).rsqrt()
            z = torch.lerp(z, following, _RELAX)
            down, right = torch.lerp(down, new_down * shrink, _RELAX), torch.lerp(right, new_right * shrink, _RELAX)
        return z, down, right

    def _rises(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The dual step for the difference to the pixel below `(H, 1)` and to the right `(W,)`; 0 at the last one."""
        rise = 1 / (8 * _TAU * self.weight)
        rises = z.new_full((z.shape[-2], 1), rise), z.new_full((z.shape[-1],), rise)
        rises[0][-1], rises[1][-1] = 0, 0
        return rises


def _fill(problem: _Problem) -> Tensor:
    """The kept pixels, and in the gaps an average of those around, weighted by distance."""
    ramp = torch.tensor([1.0, 2, 3, 2, 1], device=problem.kept.device, dtype=problem.kept.dtype)
    kernel = torch.outer(ramp, ramp).expand(3, 1, 5, 5)
    total = F.conv2d(problem.kept, kernel, padding=2, groups=3)
    average = total / F.conv2d(problem.mask, kernel, padding=2, groups=3).clamp(min=1)
    return torch.where(problem.mask > 0, problem.kept, average)


SPEC = DefenseSpec(
    name="tvm",
    summary="random pixels dropped, the image rebuilt with least total variation",
    factory=TotalVariation,
    source="Guo et al. 2018 (ICLR), arXiv 1711.00117",
    stochastic=True,
)
