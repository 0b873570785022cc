"""One loop for every iterative gradient attack: ascend a loss, step by a rule, project, keep the best.

The loop spends exactly `steps` forward and backward passes on a sample that resists. Unless the view asks for
exhaustive images, a sample leaves the batch as soon as it is fooled, which is where the time is saved.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from robustbench_x.threat import ThreatModel
from robustbench_x.views import View

__all__ = ["Evaluation", "Objective", "StepRule", "Walk", "ascend"]

_LEAVING_MARGIN = 1e-2
"""Logit margin by which a sample must be fooled to leave: the judge's fp32 pass in another batch must agree."""


class Evaluation(NamedTuple):
    """Per-sample loss to ascend, `(N,)` with gradient, and the margin by which each is fooled (None: unknowable)."""

    loss: Tensor
    margin: Tensor | None


class Objective(Protocol):
    """Evaluates images of the samples that `index` names (positions in the view's batch)."""

    def __call__(self, images: Tensor, index: Tensor) -> Evaluation:
        """Loss and margin of `images` `(len(index), C, H, W)`."""


@final
@dataclass
class Walk:
    """Where the samples still under attack stand; every tensor's first axis runs over them."""

    threat: ThreatModel
    index: Tensor
    inputs: Tensor
    images: Tensor
    previous: Tensor
    step: int = 0
    loss: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    memory: dict[str, Tensor] = field(default_factory=dict)
    """Per-sample state of the step rule."""

    def project(self, images: Tensor) -> Tensor:
        """`images` back inside the budget."""
        return self.threat.project(images, self.inputs)

    def keep(self, mask: Tensor) -> None:
        """Drops every sample where `mask` is False."""
        for name in ("index", "inputs", "images", "previous", "loss", "gradient"):
            setattr(self, name, getattr(self, name)[mask])
        self.memory = {name: value[mask] for name, value in self.memory.items()}


StepRule = Callable[[Walk], Tensor]
"""The next images, projected, from a walk whose `loss` and `gradient` belong to its `images`."""


def ascend(
    view: View,
    objective: Objective,
    rule: StepRule,
    *,
    steps: int,
    random_start: bool,
    restarts: int = 1,
    draws: int = 1,
    best: "Best | None" = None,
    start: Tensor | None = None,
    random_loss: bool = False,
) -> "Best":
    """Runs the loop over the whole batch and returns the best images found.

    Args:
        view: Inputs, budget and randomness.
        objective: What to ascend.
        rule: How to step.
        steps: Gradient steps per restart.
        random_start: Start from a random point of the budget; else from the clean image.
        restarts: Independent walks; the best survives.
        draws: Passes averaged per step, for a victim that draws anew each time (EOT, Athalye et al. 2018).
        best: Continues from an earlier result: fooled samples are skipped unless the view is exhaustive.
        start: Where the first walk starts, inside the budget, in place of the clean or a random point.
        random_loss: The loss draws anew at every call, so that two steps cannot be compared by it: the last images are
            kept, not those of the luckiest draw. Only for losses that know no margin.
    """
    best = best or Best(view.inputs)
    if view.threat.radius == 0:
        return best
    for restart in range(restarts):
        index = best.pending(exhaustive=view.exhaustive)
        if not len(index):
            break
        inputs = view.inputs[index]
        if start is not None and not restart:
            first = start[index].clone()
        else:
            first = view.threat.start(inputs, view.random, index) if random_start or restart else inputs.clone()
        walk = Walk(threat=view.threat, index=index, inputs=inputs, images=first, previous=first)
        _walk(view, walk, objective, rule, steps, draws, best, judge_last=restarts > 1, random_loss=random_loss)
    best.spoil()
    return best


@final
class Best:
    """The best images so far: the widest fooling margin where one is known, else the last or highest-loss ones."""

    def __init__(self, inputs: Tensor) -> None:
        self.images = inputs.clone()
        self.score = torch.full((len(inputs),), -torch.inf, device=inputs.device)
        self.fooled = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        self._safely = self.fooled.clone()
        self._broken = self.fooled.clone()

    def pending(self, *, exhaustive: bool) -> Tensor:
        """Positions of the samples still worth attacking."""
        return torch.arange(len(self.images), device=self.images.device)[
            torch.ones_like(self._safely) if exhaustive else ~self._safely
        ]

    def offer(self, index: Tensor, images: Tensor, result: Evaluation) -> None:
        """Takes the images that beat what is held."""
        score = (result.loss if result.margin is None else result.margin).detach()
        better = score > self.score[index]
        chosen = index[better]
        self.images[chosen] = images[better].detach()
        self.score[chosen] = score[better]
        if result.margin is not None:
            self.fooled[chosen] = score[better] > 0
            self._safely[chosen] = score[better] > _LEAVING_MARGIN

    def settle(self, index: Tensor, images: Tensor) -> None:
        """Takes unevaluated last iterates where nothing held fools: the judge will say whether they do."""
        open_ = ~self.fooled[index]
        self.images[index[open_]] = images[open_].detach()

    def breaks(self, index: Tensor, broken: Tensor) -> None:
        """Notes which of `index` met a gradient that is NaN or infinite, which no step can follow."""
        self._broken[index] |= broken

    def spoil(self) -> None:
        """Makes NaN of what broke and fools nothing: the judge turns it into an error, never into robustness."""
        self.images[self._broken & ~self.fooled] = torch.nan

    def done(self, index: Tensor) -> Tensor:
        """Which of `index` are fooled by a safe margin."""
        return self._safely[index]


def _walk(
    view: View,
    walk: Walk,
    objective: Objective,
    rule: StepRule,
    steps: int,
    draws: int,
    best: Best,
    *,
    judge_last: bool,
    random_loss: bool,
) -> None:
    knows_margin = True
    for step in range(steps):
        walk.step = step
        result = _evaluate(walk, objective, draws)
        broken = ~walk.gradient.isfinite().flatten(1).all(dim=1)
        best.breaks(walk.index, broken)
        walk.gradient[broken] = 0  # torch's sign of NaN is 0: the image would stand still and pass for robust
        knows_margin = result.margin is not None
        if not random_loss:
            best.offer(walk.index, walk.images, result)
        if not view.exhaustive and (leaving := best.done(walk.index)).any():
            walk.keep(~leaving)
            if not len(walk.index):
                return
        images = rule(walk)
        walk.previous, walk.images = walk.images, images
    if random_loss:
        best.settle(walk.index, walk.images)
        return
    if judge_last or not knows_margin:
        with torch.no_grad():
            best.offer(walk.index, walk.images, objective(walk.images, walk.index))
    if knows_margin:
        best.settle(walk.index, walk.images)


def _evaluate(walk: Walk, objective: Objective, draws: int) -> Evaluation:
    """Loss, margin and gradient at the walk's images, averaged over `draws` passes.

    Over several draws the margin kept is the smallest: a sample is fooled when every draw is.
    """
    images = walk.images.detach().requires_grad_(True)
    loss = torch.zeros(len(images), device=images.device)
    gradient = torch.zeros_like(images)
    margins: list[Tensor] = []
    with torch.enable_grad():
        for _ in range(draws):
            result = objective(images, walk.index)
            (piece,) = torch.autograd.grad(result.loss.sum(), images)
            loss.add_(result.loss.detach(), alpha=1 / draws)
            gradient.add_(piece, alpha=1 / draws)
            if result.margin is not None:
                margins.append(result.margin.detach())
    walk.loss, walk.gradient = loss, gradient
    return Evaluation(loss, torch.stack(margins).amin(dim=0) if margins else None)
