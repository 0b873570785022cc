"""White-box gradient attacks on the victim's logits: pgd, mifgsm, apgd_ce, apgd_t.

Behind a detector every one of them ascends the smaller of the margin and the detector's acceptance.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import WhiteboxView
from robustbench_x_attacks import losses
from robustbench_x_attacks.iterative import Best, Evaluation, Objective, StepRule, ascend
from robustbench_x_attacks.steps import apgd, momentum, steepest

__all__ = ["APGDCE", "APGDT", "MIFGSM", "PGD", "SPECS"]

LossName = Literal["ce", "margin", "dlr"]
TargetLossName = Literal["ce", "dlr"]
_LABEL_LOSSES: dict[str, losses.LabelLoss] = {
    "ce": losses.cross_entropy,
    "margin": losses.margin,
    "dlr": losses.dlr,
}
_TARGET_LOSSES: dict[str, losses.TargetLoss] = {
    "ce": losses.cross_entropy_targeted,
    "dlr": losses.dlr_targeted,
}
_EOT_HELP = "passes averaged per step when the victim is random (expectation over transformation)"


@final
@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient descent (Madry et al. 2018).

    Departures: the iterate with the widest fooling margin is returned, not always the last; a fooled sample
    leaves the batch unless exhaustive images are asked for.
    """

    steps: int = param(20, "gradient steps per restart")
    step_size: float | None = param(None, "in [0, 1] units; default 2.5 * eps / steps")
    loss: LossName = param("ce", "ce, margin or dlr")
    restarts: int = param(1, "independent random starts")
    random_start: bool = param(True, "start from a uniform point of the budget")
    eot: int = param(10, _EOT_HELP)

    def __post_init__(self) -> None:
        _check_counts(steps=self.steps, restarts=self.restarts, eot=self.eot)

    def run(self, view: WhiteboxView) -> Tensor:
        """Adversarial images; access `whitebox`."""
        size = self.step_size if self.step_size is not None else 2.5 * view.threat.radius / self.steps
        return _run(view, self.loss, steepest(size), self.steps, self.restarts, self.random_start, self.eot)


@final
@dataclass(frozen=True, kw_only=True)
class MIFGSM:
    """Momentum iterative FGSM (Dong et al. 2018); starts at the clean image. Departures as for `PGD`."""

    steps: int = param(10, "gradient steps")
    step_size: float | None = param(None, "in [0, 1] units; default eps / steps")
    decay: float = param(1.0, "share of the momentum kept per step")
    loss: LossName = param("ce", "ce, margin or dlr")
    eot: int = param(10, _EOT_HELP)

    def __post_init__(self) -> None:
        _check_counts(steps=self.steps, eot=self.eot)

    def run(self, view: WhiteboxView) -> Tensor:
        """Adversarial images; access `whitebox`."""
        size = self.step_size if self.step_size is not None else view.threat.radius / self.steps
        return _run(view, self.loss, momentum(size, self.decay), self.steps, 1, False, self.eot)


@final
@dataclass(frozen=True, kw_only=True)
class APGDCE:
    """Auto-PGD on the cross-entropy (Croce & Hein 2020): parameter-free step schedule, restarts.

    Departures: as for `PGD`; the random start is uniform in the budget, where the paper rescales the draw to
    its surface.
    """

    steps: int = param(50, "gradient steps per restart (AutoAttack uses 100)")
    restarts: int = param(1, "independent random starts")
    rho: float = param(0.75, "share of rising steps below which the step size is halved")
    eot: int = param(10, _EOT_HELP)

    def __post_init__(self) -> None:
        _check_counts(steps=self.steps, restarts=self.restarts, eot=self.eot)

    def run(self, view: WhiteboxView) -> Tensor:
        """Adversarial images; access `whitebox`."""
        return _run(view, "ce", apgd(self.steps, rho=self.rho), self.steps, self.restarts, True, self.eot)


@final
@dataclass(frozen=True, kw_only=True)
class APGDT:
    """Targeted Auto-PGD (Croce & Hein 2020): one walk toward each of the likeliest wrong classes.

    Targets are the `targets` highest other logits on the clean image. Departures as for `APGDCE`. The DLR loss divides
    by what the fourth logit helps to make; below four classes its numerator alone is ascended, a choice of ours.
    """

    steps: int = param(50, "gradient steps per target (AutoAttack uses 100)")
    targets: int = param(9, "wrong classes tried, likeliest first; capped at classes - 1")
    loss: TargetLossName = param("dlr", "dlr or ce")
    rho: float = param(0.75, "share of rising steps below which the step size is halved")
    eot: int = param(10, _EOT_HELP)

    def __post_init__(self) -> None:
        _check_counts(steps=self.steps, targets=self.targets, eot=self.eot)

    def run(self, view: WhiteboxView) -> Tensor:
        """Adversarial images; access `whitebox`."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        with torch.no_grad():
            logits = view.model(view.inputs)
        others = logits.scatter(1, view.labels[:, None], -torch.inf)
        order = others.topk(min(self.targets, view.num_classes - 1), dim=1).indices
        plain = self.loss == "dlr" and view.num_classes < 4
        loss = losses.lead if plain else _TARGET_LOSSES[self.loss]
        best = Best(view.inputs)
        for column in range(order.shape[1]):
            objective = _towards(view, order[:, column], loss)
            best = ascend(
                view,
                objective,
                apgd(self.steps, rho=self.rho),
                steps=self.steps,
                random_start=True,
                draws=self.eot if view.model.stochastic else 1,
                best=best,
            )
        return best.images


def _run(
    view: WhiteboxView, loss: str, rule: StepRule, steps: int, restarts: int, random_start: bool, eot: int
) -> Tensor:
    best = ascend(
        view,
        _away(view, _LABEL_LOSSES[loss]),
        rule,
        steps=steps,
        restarts=restarts,
        random_start=random_start,
        draws=eot if view.model.stochastic else 1,
    )
    return best.images


def _away(view: WhiteboxView, loss: losses.LabelLoss) -> Objective:
    def objective(images: Tensor, index: Tensor) -> Evaluation:
        logits, labels = view.model(images), view.labels[index]
        margin = losses.margin(logits, labels)
        return Evaluation(loss(logits, labels), margin) if view.detector is None else _joint(view, images, margin)

    return objective


def _joint(view: WhiteboxView, images: Tensor, margin: Tensor) -> Evaluation:
    """Fooled and accepted: the smaller of both margins is ascended, whatever loss was asked for.

    Its gradient is that of the condition that is violated most, as in the selective attack of Bryniarski et al. (2021):
    the classifier's while the image is still right, the detector's once it is wrong and refused.
    """
    assert view.detector is not None, "no detector"
    both = torch.minimum(margin, view.detector(images))
    return Evaluation(both, both)


def _towards(view: WhiteboxView, targets: Tensor, loss: losses.TargetLoss) -> Objective:
    def objective(images: Tensor, index: Tensor) -> Evaluation:
        logits, labels = view.model(images), view.labels[index]
        if view.detector is not None:
            aim = logits.gather(1, targets[index][:, None]) - logits.gather(1, labels[:, None])
            return _joint(view, images, aim.squeeze(1))
        return Evaluation(loss(logits, labels, targets[index]), losses.margin(logits, labels))

    return objective


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


SPECS = (
    AttackSpec(
        name="pgd",
        summary="projected gradient descent with random start",
        factory=PGD,
        source="Madry et al. 2018, arXiv 1706.06083",
        access="whitebox",
        norms=("linf", "l2", "patch"),
        joint=True,
    ),
    AttackSpec(
        name="mifgsm",
        summary="iterative FGSM with momentum",
        factory=MIFGSM,
        source="Dong et al. 2018, arXiv 1710.06081",
        access="whitebox",
        norms=("linf", "l2", "patch"),
        joint=True,
    ),
    AttackSpec(
        name="apgd_ce",
        summary="Auto-PGD on the cross-entropy, parameter-free",
        factory=APGDCE,
        source="Croce & Hein 2020, arXiv 2003.01690",
        access="whitebox",
        norms=("linf", "l2", "patch"),
        joint=True,
    ),
    AttackSpec(
        name="apgd_t",
        summary="targeted Auto-PGD over the likeliest wrong classes",
        factory=APGDT,
        source="Croce & Hein 2020, arXiv 2003.01690",
        access="whitebox",
        norms=("linf", "l2", "patch"),
        goal="targeted",
        joint=True,
    ),
)
