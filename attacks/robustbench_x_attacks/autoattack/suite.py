"""AutoAttack: four attacks one after the other, each on what the ones before it left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import WhiteboxView
from robustbench_x_attacks import losses
from robustbench_x_attacks.autoattack.asking import Asking
from robustbench_x_attacks.autoattack.fab import BoundaryWalk, likeliest_wrong
from robustbench_x_attacks.autoattack.square import hunt
from robustbench_x_attacks.iterative import Best, Evaluation, ascend
from robustbench_x_attacks.steps import apgd

__all__ = ["SPEC", "AutoAttack"]

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What a part ascends: logits `(N, K)`, labels `(N,)` and the samples' positions `(N,)` to `(N,)`."""


@final
@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690): APGD on the cross-entropy, APGD-T, FAB-T and Square.

    `rand`, for victims that draw anew at every call, is APGD on the cross-entropy and on the DLR loss, with averaged
    gradients.

    Departures. A sample leaves at the step that fools it by a safe margin, where there it stays to the end of the
    running part; one that the victim gets wrong without any attack leaves at once. Targets are ranked once, on the
    clean image. Square draws a window for each sample, and its start counts as a query. Where the DLR loss is
    undefined, it gives way to the same difference of logits without its denominator: below 4 classes in APGD-T,
    below 3 in `rand`. Gradients are averaged only where the victim is random. Square asks through the white-box
    view, so it counts as forwards, and sees the defence as far as the attacker knows it. Exhaustive images come from
    APGD, which then spends every step on every sample; FAB, which stops at the boundary, and Square still only
    see samples that nothing fools. What resists everything returns the image with the widest margin.
    """

    steps: int = param(100, "steps of each APGD and FAB walk")
    targets: int = param(9, "wrong classes tried by APGD-T and FAB-T, likeliest first; capped at classes - 1")
    queries: int = param(5000, "queries of Square per sample")
    version: Literal["auto", "standard", "rand"] = param("auto", "standard, rand, or auto: rand for a random victim")
    eot: int = param(20, "passes averaged per APGD step when the victim is random")

    def __post_init__(self) -> None:
        for name in ("steps", "targets", "queries", "eot"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def run(self, view: WhiteboxView) -> Tensor:
        """Adversarial images; access `whitebox`."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        attempt = _Attempt(view, draws=self.eot if view.model.stochastic else 1, steps=self.steps)
        logits = attempt.look()
        if self.version == "rand" or (self.version == "auto" and view.model.stochastic):
            attempt.climb(_cross_entropy)
            attempt.climb(_away if view.num_classes < 3 else _dlr)
            return attempt.result()
        order = likeliest_wrong(logits, view.labels, self.targets)
        attempt.climb(_cross_entropy)
        for targets in order.unbind(dim=1):
            attempt.climb(_toward(targets, rescaled=view.num_classes >= 4))
        BoundaryWalk(steps=self.steps).run(view, order, _Inside(view, attempt))
        asking = Asking(view, view.model, attempt.best, attempt.widest)
        hunt(asking, queries=self.queries, p_init=0.8, exhaustive=False)
        return attempt.result()


@final
class _Attempt:
    """What the parts have in common: who is left, and the best images so far.

    `best` decides who is left. `widest` keeps the image of the widest margin of a sample that nothing fools, where
    `best` holds the last iterate of the last walk.
    """

    def __init__(self, view: WhiteboxView, *, draws: int, steps: int) -> None:
        self.best, self.widest = Best(view.inputs), Best(view.inputs)
        self._view, self._draws, self._steps = view, draws, steps

    def look(self) -> Tensor:
        """Logits of the clean images; what a victim without randomness gets wrong already is fooled."""
        view = self._view
        everyone = torch.arange(len(view.inputs), device=view.inputs.device)
        with torch.no_grad():
            logits = view.model(view.inputs)
        self.best.breaks(everyone, ~logits.isfinite().all(dim=1))
        margin = losses.margin(logits, view.labels)
        if not view.model.stochastic:
            self.offer(everyone, view.inputs, margin)
        return logits

    def offer(self, index: Tensor, images: Tensor, margin: Tensor) -> None:
        """Images inside the budget that are misclassified by `margin` `(len(index),)`."""
        for best in (self.best, self.widest):
            best.offer(index, images, Evaluation(margin, margin))

    def climb(self, score: Score) -> None:
        """One walk of APGD from a random start; the point after its last step is evaluated too, as in AutoAttack."""
        view = self._view

        def objective(images: Tensor, index: Tensor) -> Evaluation:
            logits, labels = view.model(images), view.labels[index]
            result = Evaluation(score(logits, labels, index), losses.margin(logits, labels))
            self.widest.offer(index, images, result)
            return result

        ascend(
            view,
            objective,
            apgd(self._steps),
            steps=self._steps + 1,
            random_start=True,
            draws=self._draws,
            best=self.best,
        )

    def result(self) -> Tensor:
        """The images, NaN where a logit or gradient was and nothing fools: never robust."""
        self.best.spoil()
        if self._view.model.stochastic:
            return self.best.images  # the widest margin of a single draw is luck
        lost = self.best.images.isnan().flatten(1).any(dim=1)
        held = (self.best.fooled | lost).view(-1, 1, 1, 1)
        return torch.where(held, self.best.images, self.widest.images)


@final
class _Inside:
    """Takes of FAB's images those inside the budget."""

    def __init__(self, view: WhiteboxView, attempt: _Attempt) -> None:
        self._view, self._attempt = view, attempt

    def pending(self) -> Tensor:
        return self._attempt.best.pending(exhaustive=False)

    def take(self, index: Tensor, images: Tensor, margin: Tensor) -> None:
        inside = self._view.threat.distance(images, self._view.inputs[index]) <= self._view.threat.eps
        self._attempt.offer(index[inside], images[inside], margin[inside])

    def done(self, index: Tensor) -> Tensor:
        return self._attempt.best.done(index)

    def breaks(self, index: Tensor, broken: Tensor) -> None:
        self._attempt.best.breaks(index, broken)

    def settle(self, index: Tensor, images: Tensor) -> None:
        """Nothing: what resists returns its widest margin."""


def _cross_entropy(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return losses.cross_entropy(logits, labels)


def _dlr(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return losses.dlr(logits, labels)


def _away(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return losses.margin(logits, labels)


def _toward(targets: Tensor, *, rescaled: bool) -> Score:
    """The targeted DLR loss, or the difference of logits that it rescales."""

    def score(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        aims = targets[index]
        if rescaled:
            return losses.dlr_targeted(logits, labels, aims)
        return losses.lead(logits, labels, aims)

    return score


SPEC = AttackSpec(
    name="autoattack",
    summary="APGD-CE, APGD-T, FAB-T and Square, each on what the others left",
    factory=AutoAttack,
    source="Croce & Hein 2020, arXiv 2003.01690",
    access="whitebox",
    norms=("linf", "l2"),
)
