"""Targeted FAB: the smallest change that crosses a decision boundary."""

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.threat import ThreatModel
from robustbench_x.views import WhiteboxView
from robustbench_x_attacks import losses
from robustbench_x_attacks.autoattack.asking import confirmed
from robustbench_x_attacks.autoattack.projection import to_hyperplane

__all__ = ["FABT", "SPEC", "BoundaryWalk", "Record", "likeliest_wrong"]

_LEAVING_MARGIN = 1e-2
"""Logit margin by which a sample must be fooled inside the budget to leave, as in every iterative attack here."""


class Record(Protocol):
    """Who keeps what a walk along the boundary finds."""

    def pending(self) -> Tensor:
        """Positions of the samples still worth a walk."""

    def take(self, index: Tensor, images: Tensor, margin: Tensor) -> None:
        """Images of any norm that are misclassified by `margin` `(len(index),)`."""

    def done(self, index: Tensor) -> Tensor:
        """Which of `index` may leave."""

    def breaks(self, index: Tensor, broken: Tensor) -> None:
        """Notes which of `index` met a logit or gradient that is NaN or infinite."""

    def settle(self, index: Tensor, images: Tensor) -> None:
        """Offers the last iterates, for samples with nothing better."""


@final
@dataclass(frozen=True, kw_only=True)
class BoundaryWalk:
    """FAB's iteration (Croce & Hein 2020, algorithm 1), toward one given class after the other."""

    steps: int
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def run(self, view: WhiteboxView, order: Tensor, record: Record) -> None:
        """Walks from the clean image toward each of the classes `order` `(N, targets)`.

        A step costs two forwards and a gradient.
        A sample leaves between two steps as soon as `record` is done with it.
        """
        for targets in order.unbind(dim=1):
            index = record.pending()
            if not len(index):
                return
            images = view.inputs[index].clone()
            for _ in range(self.steps):
                images = self._step(view, index, images, targets[index], record)
                staying = ~record.done(index)
                index, images = index[staying], images[staying]
                if not len(index):
                    break
            record.settle(index, images)

    def _step(self, view: WhiteboxView, index: Tensor, images: Tensor, targets: Tensor, record: Record) -> Tensor:
        clean, labels = view.inputs[index], view.labels[index]
        difference, gradient = _linearised(view, images, labels, targets)
        broken = ~(difference.isfinite() & gradient.isfinite().flatten(1).all(dim=1))
        record.breaks(index, broken)
        difference, gradient = difference.masked_fill(broken, 0), gradient.masked_fill(_wide(broken), 0)
        moved = self._toward_boundary(images, clean, difference, gradient, view.threat)
        with torch.no_grad():
            logits = view.model(moved)
        record.breaks(index, ~logits.isfinite().all(dim=1))
        margin = losses.margin(logits, labels)
        if view.model.stochastic:
            margin, _ = confirmed(margin, margin > 0, view.model, moved, labels)
        crossed = margin > 0
        record.take(index[crossed], moved[crossed], margin[crossed])
        return torch.where(_wide(crossed), (clean + self.beta * (moved - clean)).clamp(0, 1), moved)

    def _toward_boundary(
        self, images: Tensor, clean: Tensor, difference: Tensor, gradient: Tensor, threat: ThreatModel
    ) -> Tensor:
        """Both the iterate and the clean image go past the linearised boundary; the next iterate lies between them."""
        count, normal = len(images), gradient.flatten(1)
        lag = (gradient * (clean - images)).flatten(1).sum(dim=1)
        changes = to_hyperplane(
            torch.cat([images, clean]).flatten(1),
            torch.cat([normal, normal]),
            torch.cat([-difference, -difference - lag]),
            "l2" if threat.norm == "l2" else "linf",
        ).view(2 * count, *images.shape[1:])
        sizes = threat.distance(changes, torch.zeros_like(changes)).clamp(min=1e-8)
        share = _wide((sizes[:count] / (sizes[:count] + sizes[count:])).clamp(max=self.alpha_max))
        return (
            (1 - share) * (images + self.eta * changes[:count]) + share * (clean + self.eta * changes[count:])
        ).clamp(0, 1)


@final
@dataclass(frozen=True, kw_only=True)
class FABT:
    """Targeted fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044; AutoAttack's FAB-T).

    For each of the likeliest wrong classes it linearises the boundary to that class at the iterate, goes past it
    inside the box, and pulls back what is misclassified. The misclassified image nearest to the clean one is
    returned; the harness projects it. Departures: the nearest over all classes is kept, where there the first inside
    the budget is; unless exhaustive images are asked for, a sample leaves as soon as it is fooled inside the budget
    by a safe margin; a sample that nothing fools returns its last iterate. A random
    victim must be fooled on the mean of fresh draws.
    """

    steps: int = param(100, "steps per target, a gradient and two forwards each")
    targets: int = param(9, "wrong classes tried, likeliest first; capped at classes - 1")
    alpha_max: float = param(0.1, "largest pull toward the clean image")
    eta: float = param(1.05, "how far past the boundary, 1 being on it")
    beta: float = param(0.9, "share of the change kept when a misclassified iterate is pulled back")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.targets < 1:
            raise ValueError("steps and targets must be at least 1")
        if not 0 <= self.alpha_max <= 1 or not 0 < self.beta < 1 or self.eta < 1:
            raise ValueError("alpha_max must lie in [0, 1], beta between 0 and 1, eta at 1 or above")

    def run(self, view: WhiteboxView) -> Tensor:
        """The nearest misclassified images; access `whitebox`."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        nearest = _Nearest(view)
        with torch.no_grad():
            logits = view.model(view.inputs)
        nearest.open_with(logits)
        walk = BoundaryWalk(steps=self.steps, alpha_max=self.alpha_max, eta=self.eta, beta=self.beta)
        walk.run(view, likeliest_wrong(logits, view.labels, self.targets), nearest)
        return nearest.result()


def likeliest_wrong(logits: Tensor, labels: Tensor, targets: int) -> Tensor:
    """The classes other than the label with the highest logits, `(N, min(targets, K - 1))`, highest first."""
    others = logits.nan_to_num(nan=-torch.inf).scatter(1, labels[:, None], -torch.inf)
    ranked = others.argsort(dim=1, descending=True, stable=True)
    wrong = ranked[ranked != labels[:, None]].view(len(logits), logits.shape[1] - 1)
    return wrong[:, :targets]


@final
class _Nearest:
    """Per sample the misclassified image with the smallest change, whatever the budget."""

    def __init__(self, view: WhiteboxView) -> None:
        self._view = view
        self._images = view.inputs.clone()
        self._distance = torch.full((len(view.inputs),), torch.inf, device=view.inputs.device)
        self._done = torch.zeros(len(view.inputs), dtype=torch.bool, device=view.inputs.device)
        self._broken = self._done.clone()

    def open_with(self, logits: Tensor) -> None:
        """Judges the clean images: one that is misclassified needs no change, unless a random victim merely drew so."""
        everyone = torch.arange(len(logits), device=logits.device)
        self.breaks(everyone, ~logits.isfinite().all(dim=1))
        if not self._view.model.stochastic:
            self._done = losses.margin(logits, self._view.labels) > 0
            self._distance[self._done] = 0

    def pending(self) -> Tensor:
        return (~self._done).nonzero().flatten()

    def take(self, index: Tensor, images: Tensor, margin: Tensor) -> None:
        distance = self._view.threat.distance(images, self._view.inputs[index])
        safely = (distance <= self._view.threat.eps) & (margin > _LEAVING_MARGIN)
        leaving = safely & (not self._view.exhaustive)
        taken = (distance < self._distance[index]) | leaving
        self._images[index[taken]] = images[taken]
        self._distance[index[taken]] = distance[taken]
        self._done[index[leaving]] = True

    def done(self, index: Tensor) -> Tensor:
        return self._done[index]

    def breaks(self, index: Tensor, broken: Tensor) -> None:
        self._broken[index] |= broken

    def settle(self, index: Tensor, images: Tensor) -> None:
        unfooled = self._distance[index].isinf()
        self._images[index[unfooled]] = images[unfooled]

    def result(self) -> Tensor:
        """The images, NaN where something broke and nothing fools inside the budget: never robust."""
        lost = self._broken & ~(self._distance <= self._view.threat.eps)
        return self._images.masked_fill(_wide(lost), torch.nan)


def _linearised(view: WhiteboxView, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logit of the target minus that of the label, `(N,)`, and its gradient."""
    images = images.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = view.model(images)
        pair = logits.gather(1, torch.stack([targets, labels], dim=1))
        difference = pair[:, 0] - pair[:, 1]
        (gradient,) = torch.autograd.grad(difference.sum(), images)
    return difference.detach(), gradient


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


SPEC = AttackSpec(
    name="fab_t",
    summary="smallest change across the boundary to the likeliest wrong classes",
    factory=FABT,
    source="Croce & Hein 2020, arXiv 1907.02044",
    access="whitebox",
    norms=("linf", "l2"),
    goal="targeted",
    budget=False,
)
